"""Whole models: replace their linear layers, pass text through their blocks, store their codes."""
