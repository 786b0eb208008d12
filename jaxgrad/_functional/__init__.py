"""Modules of other libraries as pure functions: `apply, params = functional(model)`.

May import `_tree` and `_text`. Support for another library is a file here.
"""
