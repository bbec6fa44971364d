"""Fetches and converts the embedded model and the texts."""
