"""Splits a loss into a frozen part that runs once per example and a step.

`traced_loss` traces, `dependence` classifies values by the rules of `batch_axis`, `min_cut` and
`split` choose what is stored, `precompute` and `features` store it, `stage` and `report` face the
user. May import `_jaxpr`, `_devices`, `_tree`, `_disk` and `_text`. To add a staging rule, add a
row to `RULES` in `batch_axis.py` and a row to its test.
"""
