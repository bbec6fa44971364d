"""Live panels for the notebooks: move a slider, see the numbers and the picture change.

One file a notebook, one function in it that returns a panel; `base.py` holds what they share and
says how to write one.
"""
