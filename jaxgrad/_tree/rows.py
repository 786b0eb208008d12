"""How many rows a batch or a dataset has: the common length of axis 0 of its arrays."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxgrad._text import listed
from jaxgrad._tree.flat import PyTree, flatten, is_hole


class RowsError(ValueError):
    """The arrays of a batch or a dataset do not have the same number of rows, or have none.

    The message names the paths with their lengths.
    """

    __module__ = "jaxgrad"


def rows_of(tree: PyTree, what: str = "the dataset", fix: str = "") -> int:
    """The number of rows of a batch or a dataset, at least one.

    Args:
        tree: arrays with the rows along axis 0.
        what: what the error calls the tree.
        fix: what the error says to do.

    Raises:
        RowsError: the arrays differ in their rows, one is a scalar, or there are no rows.
    """
    flat = flatten(tree)
    shapes = {
        path: np.shape(leaf)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not is_hole(leaf)
    }
    rows = common_rows(shapes, f"the arrays of {what}", fix)
    if not rows:
        found = listed(f"'{path}' has shape {list(shape)}" for path, shape in shapes.items())
        raise RowsError(f"{what} has no rows: {found}.")
    return rows


def common_rows(shapes: Mapping[str, Sequence[int]], what: str, fix: str = "") -> int:
    """The common length of axis 0, which may be 0, of arrays given by their shapes.

    Raises:
        RowsError: the lengths differ, an array is a scalar, or there are no arrays.
    """
    lengths: dict[int | None, list[str]] = {}
    for path, shape in shapes.items():
        lengths.setdefault(shape[0] if shape else None, []).append(f"'{path}'")
    match [*lengths]:
        case [int(rows)]:
            return rows
    found = " and ".join(map(_found, lengths.values(), lengths)) or "there are no arrays"
    text = f"{what} must have the same number of rows (axis 0): {found}."
    raise RowsError(f"{text} {fix}" if fix else text)


def _found(paths: Sequence[str], length: int | None) -> str:
    """`'x' has 3`, `'x', 'y' have 3`, `'t' is a scalar`."""
    one = len(paths) == 1
    if length is None:
        return f"{listed(paths)} {'is a scalar' if one else 'are scalars'}"
    return f"{listed(paths)} {'has' if one else 'have'} {length}"
