"""Marks statistics that a model moves, so that a function that drops them can be refused.

`apply.train` returns new statistics, and Python can't tell whether a loss uses them. The jaxpr can:
each statistic that moves passes through an equation that names it and computes nothing, and stays
in the jaxpr even if nothing reads its result.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxgrad._tree.flat import Flat, PyTree, flatten

MARK = "jaxgrad:stats/"
"""What the name of such an equation begins with; the path follows."""


def marked(before: Flat, after: PyTree, moves: Callable[[str], bool]) -> PyTree:
    """The statistics after a call, each that differs from before marked by its path.

    Args:
        before: the statistics that the call was given.
        after: those that it returned.
        moves: whether the layer that owns the statistic at a path is in training mode.
    """
    flat, old = flatten(after), dict(zip(before.paths, before.leaves, strict=True))
    leaves = [
        checkpoint_name(x, MARK + path)
        if x is not old.get(path) and moves(path) and jnp.issubdtype(x.dtype, jnp.inexact)
        else x
        for path, x in zip(flat.paths, flat.leaves, strict=True)
    ]
    return flat.treedef.unflatten(leaves)
