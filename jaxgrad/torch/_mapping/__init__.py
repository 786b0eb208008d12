"""Maps PyTorch tensors to the leaves of a Flax model, and reports the mapping.

`flax_layers` knows the layer types and `layouts` their tensors: a new layer type needs a line in
the first and a function in the second. May import `_reading`, `_tree` and `_text`.
"""
