"""Which leaves: from a `wrt` to a boolean tree, and from that to two halves of a tree.

PyTorch keeps `requires_grad` on the tensor, so what is trained is spread over the model's
state. Here it is one value, `wrt`, that is given to whatever needs it. A tree is taken apart
by the *position* of its leaves and named by their paths; neither the tree nor its leaves
change, so the same `wrt` serves gradients, optimizers, staging and checkpoints.

The hole that a leaf leaves in the other half is `None`, which JAX reads as an empty subtree:
`jax.grad`, `jax.jit` and Optax then do no work for it at all.
"""

from typing import TypeVar

import jax

from jaxgrad._text import count, listed
from jaxgrad._tree.flat import (
    Absent,
    Flat,
    PyTree,
    check_same_structure,
    flatten,
    halves,
    is_array,
    is_hole,
    leaf_name,
)
from jaxgrad._tree.nnx import nnx_types
from jaxgrad._tree.wrt import SelectionError, Wrt, listed_paths, match

T = TypeVar("T")


class MergeError(ValueError):
    """Halves that do not make up one tree: the message names the paths at fault."""

    __module__ = "jaxgrad"


def select(tree: T, wrt: Wrt) -> T:
    """Returns the boolean tree that says which leaves `wrt` selects.

    Args:
        tree: any pytree: a Linen dict, an NNX State or module, an Equinox module, a dataclass,
            nested lists, an Optax state.
        wrt: one of

            - a glob over paths: `*` matches within a level, `**` across levels (none included),
              `?` one character, `[ab]` one of a set; `"!embed/**"` excludes: everything but;
            - a list of globs: the leaves that one of them matches (all leaves, where the list
              only excludes) and that no exclusion matches;
            - a predicate `(path, leaf) -> bool`;
            - a tree of booleans: each decides its own path and all below it.

            A leaf that is no array (a function in an Equinox module) is never selected.

    Returns:
        A tree of `bool` of the structure of `tree`; its holes stay holes.

    Raises:
        SelectionError: a pattern matches no leaf (the nearest paths are named), nothing is
            selected, a boolean tree does not fit, or an NNX parameter is tied: it stands at two
            paths, whose copies would each get a part of the gradient. A module that is itself an
            argument of `jax.jit` has lost its ties before anything can see them: tied models
            take `functional`.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> head = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
        >>> params = {"head": head, "trunk": jnp.ones(3)}
        >>> jg.select(params, ["head/**", "!**/bias"])
        {'head': {'bias': False, 'kernel': True}, 'trunk': False}
        >>> jg.select(params, lambda path, leaf: leaf.ndim == 1)
        {'head': {'bias': True, 'kernel': False}, 'trunk': True}
        >>> jg.select(params, {"head": True, "trunk": False})
        {'head': {'bias': True, 'kernel': True}, 'trunk': False}

    Source: `for p in module.parameters(): p.requires_grad_(...)`.
    """
    flat, chosen = _select(tree, wrt)
    holes = (is_hole(leaf) for leaf in flat.leaves)
    return flat.treedef.unflatten(
        [leaf if hole else c for leaf, hole, c in zip(flat.leaves, holes, chosen, strict=True)]
    )


def partition(tree: T, wrt: Wrt) -> tuple[T, T]:
    """Splits a tree into the selected leaves and the rest, each with holes for the other.

    Args:
        tree: any pytree.
        wrt: the leaves of the first half; see `select`.

    Returns:
        `(selected, rest)`, both of the structure of `tree` with `None` in place of the leaves
        that are in the other half. `merge(selected, rest)` is the tree again.

    Raises:
        SelectionError: as `select`.

    Example:
        >>> import jaxgrad as jg
        >>> jg.partition({"head": 1.0, "trunk": [2.0, 3.0]}, "head")
        ({'head': 1.0, 'trunk': [None, None]}, {'head': None, 'trunk': [2.0, 3.0]})

    Source: Equinox's `partition`, by path.
    """
    return halves(*_select(tree, wrt))


def merge(*trees: T) -> T:
    """Puts the halves of a tree together again.

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

    Source: Equinox's `combine`, which lets the first of two leaves win unseen.
    """
    if not trees:
        raise TypeError("merge() needs at least one tree")
    flats = [flatten(tree) for tree in trees]
    for i, flat in enumerate(flats[1:], 1):
        check_same_structure(flats[0], flat, "tree 0", f"tree {i}", MergeError)
    first = flats[0]
    merged, twice, missing = [], [], []
    for path, *column in zip(first.paths, *(flat.leaves for flat in flats), strict=True):
        found = [i for i, leaf in enumerate(column) if not is_hole(leaf)]
        if len(found) > 1:
            twice.append(f"'{path}' (in trees {' and '.join(map(str, found))})")
        elif not found and not any(isinstance(leaf, Absent) for leaf in column):
            missing.append(f"'{path}'")
        merged.append(column[found[0]] if found else None)
    if twice:
        raise MergeError(
            f"{count(twice, 'leaf')} in more than one tree: {listed(twice)}. "
            "Halves that were split by the same `wrt` do not overlap."
        )
    if missing:
        raise MergeError(
            f"{count(missing, 'leaf')} in none of the {len(trees)} trees: {listed(missing)}. "
            "Pass every half; where None is the value meant, take the halves from `partition`."
        )
    return first.treedef.unflatten(merged)


def _select(tree: PyTree, wrt: Wrt) -> tuple[Flat, list[bool]]:
    refuse_tied(tree)
    flat = flatten(tree)
    chosen = match(flat, wrt)
    if not any(c and is_array(leaf) for c, leaf in zip(chosen, flat.leaves, strict=True)):
        what = "a predicate" if callable(wrt) else repr(wrt)
        raise SelectionError(
            f"wrt selects no leaf: {what}. Nothing would be differentiated or trained. "
            f"The tree's paths: {listed_paths(flat)}."
        )
    return flat, chosen


def refuse_tied(tree: PyTree) -> None:
    """Raises where one NNX variable stands at two paths."""
    variable = nnx_types("Variable")
    if not variable:
        return
    seen: dict[int, str] = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, variable))
    for path, node in nodes:
        if not isinstance(node, variable):
            continue
        name = leaf_name(path)
        if (first := seen.setdefault(id(node), name)) != name:
            raise SelectionError(
                f"'{first}' and '{name}' are one tied {type(node).__name__}. Taken apart as a "
                "pytree, each copy would get a part of the gradient and they would drift apart. "
                "Use `apply, params = jaxgrad.functional(model)`, which keeps them one."
            )
