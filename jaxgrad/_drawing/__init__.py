"""Pictures of traced functions: nodes and owners, a layered layout, SVG.

`picture.py` is what people call. May import `_staging`, `_jaxpr`, `_tree` and `_text`. A new way
to group equations belongs in `owners.py`, a new mark in `svg.py`.
"""
