"""Writes parameters as PyTorch state dicts or safetensors files.

May import `_mapping`, `_reading`, `_disk`, `_tree` and `_text`.
"""
