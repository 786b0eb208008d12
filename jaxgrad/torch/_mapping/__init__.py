"""Pairs PyTorch's tensors with the leaves of a Flax model, and says how it did.

Layers and their layouts stand in `flax_layers` and `layouts`: a PyTorch layer is one record
there. May import `_reading`, `_tree` and `_text`.
"""
