"""Builds Flax models from the PyTorch modules in files.

`translate` handles the classes of `torch.nn`: add a new one there. May import `_mapping`,
`_reading`, `_tree` and `_text`.
"""
