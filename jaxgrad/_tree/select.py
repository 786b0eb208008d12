"""Selects leaves: a `wrt` resolved against a tree, and the tree split by it."""

import dataclasses
from typing import TypeVar

from jaxgrad._tree.flat import Flat, PyTree, abstract, flatten, is_value, variables
from jaxgrad._tree.selection import Selection, SelectionError
from jaxgrad._tree.wrt import Wrt, listed_paths, match

T = TypeVar("T")


def select(tree: PyTree, wrt: Wrt) -> Selection:
    """Resolves `wrt` against a tree, to a value that every other function takes as its `wrt`.

    Args:
        tree: any pytree: a Linen dict, an NNX State or module, an Equinox module, a dataclass,
            nested lists, an Optax state.
        wrt: one of

            - a glob over paths: `*` matches within a level, `**` across levels (none included),
              `?` one character, `[ab]` one of a set. A glob takes the leaves that it matches and
              everything below the nodes that it matches: `"head"` is `"head/**"`. A glob that is
              literally a path of the tree (`"w[0]"`) means that path. `"!embed"` excludes:
              everything but;
            - a list of globs: the leaves that any of them matches (all leaves, if the list
              only excludes) and that no exclusion matches;
            - a predicate `(path, leaf) -> bool`;
            - a tree of booleans: each decides its own path and all below it;
            - a `Selection`, for a tree with the same paths.

            A leaf that is not an array (a function in an Equinox module) is never selected.

    Returns:
        A `Selection`. Its repr says how much of the tree is selected, `.paths` lists the leaves,
        and `.mask` is the tree of booleans.

    Raises:
        SelectionError: a pattern matches no leaf (the message names the nearest paths), nothing is
            selected, a boolean tree or a `Selection` does not fit, or an NNX parameter is tied: it
            is at two paths, and each copy would get part of the gradient. A module that is itself
            an argument of `jax.jit` has lost its ties before anything can see them: pass tied
            models through `functional`.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> head = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
        >>> params = {"head": head, "trunk": jnp.ones(4)}
        >>> jg.select(params, "head")
        <Selection: 8 of 12 elements (66.7%), in 2 of 3 leaves>
        >>> jg.select(params, ["head", "!**/bias"]).paths
        ['head/kernel']
        >>> jg.select(params, lambda path, leaf: leaf.ndim == 1).mask
        {'head': {'bias': True, 'kernel': False}, 'trunk': True}
        >>> jg.select(params, {"head": True, "trunk": False}).mask
        {'head': {'bias': True, 'kernel': True}, 'trunk': False}

    Source: `for p in module.parameters(): p.requires_grad_(...)`.
    """
    refuse_tied(tree)
    flat = flatten(tree)
    if isinstance(wrt, Selection) and wrt.flat.treedef == flat.treedef:
        flat = dataclasses.replace(flat, named=wrt.flat.paths)
    return resolve(flat, wrt)


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
    return select(tree, wrt).split(tree)


def resolve(flat: Flat, wrt: Wrt) -> Selection:
    """`select` on a flattened tree, which may have tied parameters."""
    flags = match(flat, wrt)
    if not any(flag and is_value(leaf) for flag, leaf in zip(flags, flat.leaves, strict=True)):
        what = "a predicate" if callable(wrt) else repr(wrt)
        raise SelectionError(
            f"wrt selects no leaf: {what}. Nothing would be differentiated or trained. "
            f"The tree's paths: {listed_paths(flat)}."
        )
    return Selection(abstract(flat), tuple(flags))


def refuse_tied(tree: PyTree) -> None:
    """Raises if one NNX variable is at two paths."""
    seen: dict[int, str] = {}
    for name, node in variables(tree):
        if (first := seen.setdefault(id(node), name)) != name:
            raise SelectionError(
                f"'{first}' and '{name}' are one tied {type(node).__name__}. Flattened as a "
                "pytree, each copy would get part of the gradient and the two would drift apart. "
                "Use `apply, params = jaxgrad.functional(model)`, which keeps them tied."
            )
