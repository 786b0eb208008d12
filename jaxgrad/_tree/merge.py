"""Halves of a tree merged into the complete tree."""

from collections.abc import Sequence
from typing import TypeVar

from jaxgrad._text import count, listed
from jaxgrad._tree.flat import Absent, check_same_structure, flatten, is_hole

T = TypeVar("T")


class MergeError(ValueError):
    """Halves that do not make up one tree: the message names the paths at fault."""

    __module__ = "jaxgrad"


def merge(*trees: T) -> T:
    """Merges the halves of a tree into the complete tree.

    Args:
        *trees: trees of one structure; each leaf is in exactly one of them, and a hole in
            all others.

    Returns:
        The tree of all leaves.

    Raises:
        MergeError: the structures differ, a leaf is in two trees, or in none.

    Example:
        >>> import jaxgrad as jg
        >>> jg.merge({"head": 1.0, "trunk": None}, {"head": None, "trunk": 2.0})
        {'head': 1.0, 'trunk': 2.0}
        >>> jg.merge({"head": 1.0, "trunk": None}, {"head": 3.0, "trunk": 2.0})
        Traceback (most recent call last):
            ...
        jaxgrad.MergeError: 1 leaf is in more than one tree: 'head' (in trees 0 and 1). ...

    Source: Equinox's `combine`, which silently takes the first of two leaves.
    """
    if not trees:
        raise TypeError("merge() needs at least one tree")
    flats = [flatten(tree) for tree in trees]
    for i, flat in enumerate(flats[1:], 1):
        check_same_structure(flats[0], flat, "tree 0", f"tree {i}", MergeError)
    rows = list(zip(*(flat.leaves for flat in flats), strict=True))
    found = [[i for i, leaf in enumerate(row) if not is_hole(leaf)] for row in rows]
    absent = [any(isinstance(leaf, Absent) for leaf in row) for row in rows]
    if not all(len(f) == 1 or (not f and a) for f, a in zip(found, absent, strict=True)):
        _refuse(flats[0].paths, found, absent, len(trees))
    leaves = [row[f[0]] if f else None for row, f in zip(rows, found, strict=True)]
    return flats[0].treedef.unflatten(leaves)


def _refuse(
    paths: Sequence[str], found: Sequence[list[int]], absent: Sequence[bool], n: int
) -> None:
    twice = [
        f"'{path}' (in trees {' and '.join(map(str, f))})"
        for path, f in zip(paths, found, strict=True)
        if len(f) > 1
    ]
    missing = [
        f"'{path}'" for path, f, a in zip(paths, found, absent, strict=True) if not f and not a
    ]
    if twice:
        raise MergeError(
            f"{count(twice, 'leaf')} in more than one tree: {listed(twice)}. "
            "Halves that were split by the same `wrt` do not overlap."
        )
    raise MergeError(
        f"{count(missing, 'leaf')} in none of the {n} trees: {listed(missing)}. "
        "Pass every half; if None is the intended value, make the halves with `partition`."
    )
