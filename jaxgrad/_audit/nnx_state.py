"""What an audit checks of an NNX model: tied parameters, trained statistics, lost writes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgrad._audit.train_step import Recipe
from jaxgrad._tree.bitwise import host
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, variables


def ties(params: PyTree, flat: Flat, trained: Sequence[bool]) -> list[tuple[str, str]]:
    """The pairs of paths that share one parameter, at least one of them trained."""
    found, first = [], {}
    one = [id(v) for v in _variables(params, flat, "Variable")]
    for i, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
        if not is_array(leaf):
            continue
        key = one[i] if one[i] != id(None) else id(leaf)
        j = first.setdefault(key, i)
        # An array of equal elements is more likely a shared initial value than a tied parameter.
        same = key == one[i] or np.unique(host(leaf)).size > 1
        if j != i and same and (trained[i] or trained[j]):
            found.append((flat.paths[j], path))
    return found


def trained_stats(params: PyTree, flat: Flat, trained: Sequence[bool]) -> list[str]:
    """The paths of running statistics that are trained."""
    nodes = _variables(params, flat, "BatchStat")
    return [path for path, node, t in zip(flat.paths, nodes, trained, strict=True) if t and node]


def _variables(params: PyTree, flat: Flat, kind: str) -> list[Any]:
    """For each leaf, the NNX Variable of this kind that holds it, or None."""
    held = dict(variables(params, kind))
    return [held.get(path) for path in flat.paths]


def lost_stats(recipe: Recipe, batch: PyTree) -> list[str]:
    """The paths that the loss writes in a module it is passed."""
    lost = []

    def call(arrays: Sequence[Any], batch: PyTree) -> None:
        params = recipe.tree(arrays)
        before = flatten(params)
        recipe.loss(params, batch)
        after = flatten(params)
        known = dict(zip(after.paths, after.leaves, strict=True))
        lost.extend(
            p for p, x in zip(before.paths, before.leaves, strict=True) if known[p] is not x
        )

    jax.eval_shape(call, recipe.arrays, batch)
    return lost
