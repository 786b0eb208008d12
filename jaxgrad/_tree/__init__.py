"""Trees taken apart and named: paths, selections by `wrt`, halves, rows, bitwise comparison.

May import `_text` alone. Nearly everything else stands on it, so a new helper needs a good
reason.
"""
