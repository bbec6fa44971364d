"""A whole model: its linear layers replaced, its blocks walked, its codes on disk."""
