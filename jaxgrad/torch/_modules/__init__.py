"""Builds Flax models from PyTorch modules found in files.

`translate` knows each class of `torch.nn`. May import `_mapping`, `_reading`, `_tree` and
`_text`.
"""
