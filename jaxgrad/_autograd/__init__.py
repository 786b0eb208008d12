"""Gradients: of the selected leaves, of named intermediates, of each example, in half precision.

One file per function that people call; `loss.py` and `microbatches.py` hold what they share.
`rows.py` checks that a loss treats each example by itself, with `follow_rows`, `linear` and
`places`. May import `_staging` (its rules for the batch axis), `_jaxpr`, `_tree` and `_text`. A
new transformation of a gradient is a file here.
"""
