"""Finds out why a gradient is wrong: finite differences, and the operation that made a NaN.

May import `_autograd`, `_jaxpr`, `_tree` and `_text`. Each check of a user's function has a file
here.
"""
