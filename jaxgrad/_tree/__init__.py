"""Trees taken apart and named: paths, selections by `wrt`, halves, rows, bitwise comparison.

May import only `_text`. Nearly everything else builds on it, so a new helper needs a good
reason.
"""
