"""Writes parameters as PyTorch's state dicts, in its own format or as safetensors.

May import `_mapping`, `_reading`, `_disk`, `_tree` and `_text`.
"""
