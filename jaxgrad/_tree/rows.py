"""How many rows a batch or a dataset has: the common length of its leading axes."""

import numpy as np

from jaxgrad._tree.flat import PyTree, flatten, is_hole


def rows_of(dataset: PyTree) -> int:
    """The number of rows, which all arrays of a dataset have."""
    flat = flatten(dataset)
    sizes = {
        path: np.shape(leaf)[0] if np.ndim(leaf) else 0
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not is_hole(leaf)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"'{path}' {n}" for path, n in sizes.items()) or "no array"
        raise ValueError(
            f"the arrays of a dataset share their first axis, its rows; this one has {found}."
        )
    return next(iter(sizes.values()))
