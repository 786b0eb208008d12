"""An optimizer's state by leaf: its bytes, moments that were reset; and what a save lacks."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from jaxgrad._checkpoint.params import inspect
from jaxgrad._text import nbytes
from jaxgrad._tree.bitwise import host
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, paths


def state_bytes(flat: Flat, state: PyTree) -> list[int]:
    """The bytes of the optimizer's state that belong to each leaf."""
    return [sum(map(nbytes, arrays)) for arrays in _states(flat, state).values()]


def _states(flat: Flat, state: PyTree) -> dict[str, list[Any]]:
    """For each leaf, the arrays of the optimizer's state whose paths end in its path."""
    held: dict[str, list[Any]] = {path: [] for path in flat.paths}
    flat = flatten(state)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if is_array(leaf):
            parts = path.split("/")
            ends = ("/".join(parts[i:]) for i in range(len(parts)))
            if (owner := next((end for end in ends if end in held), None)) is not None:
                held[owner].append(leaf)
    return held


def forgotten(flat: Flat, previous: PyTree, start: PyTree, fresh: PyTree) -> list[str]:
    """The paths whose state had been built up in a run, and is now that of a new optimizer."""
    then, now, new = (_states(flat, state) for state in (previous, start, fresh))
    return [
        path
        for path in flat.paths
        if now[path] and _equal(now[path], new[path]) and not _equal(then[path], new[path])
        if len(then[path]) == len(new[path])
    ]


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, map(host, some), map(host, others)))


def unsaved(flat: Flat, saved: PyTree | str | PathLike[str] | None) -> list[str]:
    """The paths of arrays that were not saved."""
    if saved is None:
        return []
    there = inspect(saved).leaves if isinstance(saved, str | PathLike) else paths(saved)
    leaves = zip(flat.paths, flat.leaves, strict=True)
    return [path for path, leaf in leaves if is_array(leaf) and path not in there]
