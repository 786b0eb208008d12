"""Parameters and runs on disk: `arrays` writes, `params` saves trees, `run` keeps steps.

May import `_devices`, `_tree`, `_disk` and `_text`. A file format belongs in `_disk`, not here.
"""
