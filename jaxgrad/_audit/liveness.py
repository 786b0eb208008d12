"""Which gradients a training step computes, read off its jaxpr.

A frozen leaf's gradient costs nothing as long as nothing reads it, because XLA eliminates dead
code. A norm, a finite check, an accumulator or the end of a `jax.jit` reads it. So each gradient
passes through an identity that carries its name; the names that survive dead-code elimination are
those of the gradients that are computed.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from jaxgrad._audit.train_step import Recipe
from jaxgrad._jaxpr.dataflow import depending
from jaxgrad._jaxpr.inline import inline
from jaxgrad._tree.flat import PyTree, flatten, is_hole

Liveness: TypeAlias = Literal["computed", "dropped", "zero", "none", "unknown"]
"""A gradient: computed; dropped, as nothing reads it; a constant zero; absent; not known."""

_PREFIX = "jaxgrad gradient "


def liveness(recipe: Recipe, state: PyTree, batch: PyTree, grads: PyTree) -> list[Liveness]:
    """Returns what becomes of the gradient of each leaf in a step.

    Args:
        recipe: how parameters are trained.
        state: the state of the optimizer.
        batch: what the loss takes.
        grads: the gradients, whose values tell whether a constant one is zero.
    """
    flows = _flows(recipe, batch)
    live = set() if recipe.own_step else _read(recipe, state, batch)

    def of(i: int, grad: PyTree) -> Liveness:
        if is_hole(grad):
            return "none"
        if i not in flows and not np.any(np.asarray(grad)):
            return "zero"
        if recipe.own_step:
            return "unknown"
        return "computed" if live is None or i in live else "dropped"

    return [of(i, g) for i, g in enumerate(flatten(grads).leaves)]


def _flows(recipe: Recipe, batch: PyTree) -> set[int]:
    """The leaves whose gradients are a function of parameters or data, not a constant."""
    where = [i for i, has in enumerate(recipe.graded) if has]

    def grads(arrays: Sequence[Any], batch: PyTree) -> list[Any]:
        return jax.tree.leaves(recipe.grads(arrays, batch))

    closed = jax.make_jaxpr(grads)(recipe.arrays, batch)
    jaxpr = inline(closed, [False] * len(closed.jaxpr.invars)).jaxpr
    moving = depending(jaxpr.eqns, jaxpr.invars)
    return {
        i
        for i, v in zip(where, jaxpr.outvars, strict=True)
        if isinstance(v, jex.Var) and v in moving
    }


def _read(recipe: Recipe, state: PyTree, batch: PyTree) -> set[int] | None:
    """The leaves whose gradients something in the step reads; None if all are computed."""
    if recipe.leaves_its_jit:
        return None

    def named(grads: PyTree) -> PyTree:
        flat = flatten(grads)
        return flat.treedef.unflatten(
            [
                g if is_hole(g) else checkpoint_name(g, f"{_PREFIX}{i}")
                for i, g in enumerate(flat.leaves)
            ]
        )

    def step(arrays: Sequence[Any], state: PyTree, batch: PyTree) -> Any:
        return recipe.step(arrays, state, batch, named)

    closed = jax.make_jaxpr(step)(recipe.arrays, state, batch)
    jaxpr = inline(closed, [False] * len(closed.jaxpr.invars)).jaxpr
    names = (str(e.params["name"]) for e in jaxpr.eqns if e.primitive.name == "name")
    return {int(name.removeprefix(_PREFIX)) for name in names if name.startswith(_PREFIX)}
