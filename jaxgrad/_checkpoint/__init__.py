"""Parameters and runs on disk: `params` saves trees, `run` keeps steps.

Both write and read through `arrays`, and what they know beside the arrays is a `record`.

May import `_devices`, `_tree`, `_disk` and `_text`. A file format belongs in `_disk`, not here.
"""
