"""Optimizers that see selected leaves only: groups, updates with holes, averages of parameters.

May import `_tree` and `_text`. A new option of a group belongs in `param_groups.py`; what each
array of a state is, by which a resumed run finds it again, in `parts.py`.
"""
