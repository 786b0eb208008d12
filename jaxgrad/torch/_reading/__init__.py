"""Reads PyTorch's files without PyTorch, and without running the code that they may hold.

`opcodes` and `unpickler` are a pickle machine of our own; `zip_file`, `legacy_file` and
`safetensors_file` know the containers. May import `_disk` and `_text`. A new container is a file
here.
"""
