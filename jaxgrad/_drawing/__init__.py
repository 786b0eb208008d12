"""Pictures of traced functions: groups of equations, a diagram, a layered layout, SVG.

The public functions are in `picture.py`. May import `_staging`, `_jaxpr`, `_tree` and `_text`. A
new rule for the module of an equation belongs in `owners.py`, a new way to group equations in
`groups.py`, a new mark in `svg.py`.
"""
