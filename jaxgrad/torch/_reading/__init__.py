"""Reads PyTorch files without PyTorch, and without running the code that they may hold.

`opcodes` and `unpickler` are our own pickle machine; `zip_file`, `legacy_file` and
`safetensors_file` know the containers. A new container is a new file here. May import `_disk` and
`_text`.
"""
