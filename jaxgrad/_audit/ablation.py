"""Why an optimizer moves a parameter, found by experiment.

A transformation's name says little once it is chained, masked and wrapped. So the chain is run
several times, with one input changed at a time; what changes in the updates is due to that input:

- zero gradient, zero value: what still moves is *noise*;
- zero gradient, the real value: what moves beyond that is *decay*;
- zero gradient, zero value, the state after some steps: what moves beyond noise is *momentum*;
- the real gradient: what moves beyond decay is the *gradient*; if it moves along the gradient and
  not against it, the *raw gradient*, as `optax.masked` passes it through;
- the gradients of frozen leaves a thousand times larger: if that changes the steps of a trained
  leaf, those steps depend on them, through a norm.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgrad._audit.train_step import Recipe
from jaxgrad._tree.bitwise import wide
from jaxgrad._tree.flat import PyTree, flatten, is_hole

_LOUD = 1e3


@dataclasses.dataclass(frozen=True)
class Causes:
    """What moves each leaf.

    Attributes:
        reasons: for each leaf, some of "gradient", "raw gradient", "decay", "momentum", "noise".
        coupled: for each leaf, whether gradients of frozen leaves change its updates.
    """

    reasons: list[tuple[str, ...]]
    coupled: list[bool]


def causes(
    recipe: Recipe, grads: PyTree, fresh: PyTree, warm: PyTree, trained: Sequence[bool], steps: int
) -> Causes:
    """Finds what moves each leaf.

    Args:
        recipe: how parameters are trained.
        grads: the gradients at some step.
        fresh: a new state of the optimizer.
        warm: its state after some steps.
        trained: which leaves are meant to be trained.
        steps: how many updates to sum, for transformations that act only every few steps.
    """
    arrays = recipe.arrays
    nothing = [jnp.zeros_like(x) for x in arrays]
    # A weight of zero would not show that it decays.
    something = [jnp.where(x == 0, jnp.ones_like(x), x) if _is_float(x) else x for x in arrays]
    silent = jax.tree.map(jnp.zeros_like, grads)
    flat = flatten(grads)
    loud = flat.treedef.unflatten(
        [
            g if is_hole(g) or t else g * jnp.asarray(_LOUD, g.dtype)
            for g, t in zip(flat.leaves, trained, strict=True)
        ]
    )
    total = _total(recipe, steps)
    noise = total(silent, fresh, nothing)
    decayed = total(silent, fresh, something)
    coasting = total(silent, warm, nothing)
    driven = total(grads, fresh, something)
    drowned = total(loud, fresh, something)

    def reasons(i: int) -> tuple[str, ...]:
        if noise[i] is None:
            return ()
        pushed, found = _differ(driven[i], decayed[i]), []
        if pushed:
            push = driven[i] - decayed[i]
            found.append("raw gradient" if _parallel(push, flat.leaves[i]) else "gradient")
        if _differ(decayed[i], noise[i]):
            found.append("decay")
        if noise[i].any():
            found.append("noise")
        elif _differ(coasting[i], noise[i]):
            found.append("momentum")
        return tuple(found)

    n = len(flat.leaves)
    return Causes(
        [reasons(i) for i in range(n)],
        [trained[i] and _differ(driven[i], drowned[i], 1e-4) for i in range(n)],
    )


def _total(recipe: Recipe, steps: int) -> Callable[..., list[Any]]:
    """Sums the updates of each leaf over the steps, with one gradient; None for a hole."""
    update = jax.jit(recipe.update)

    def total(grads: PyTree, state: PyTree, arrays: Sequence[jax.Array]) -> list[Any]:
        sums: list[Any] = []
        for _ in range(steps):
            updates, state = update(grads, state, arrays)
            new = [None if is_hole(u) else wide(u) for u in flatten(updates).leaves]
            sums = [
                a if b is None else b if a is None else a + b
                for a, b in zip(sums or [None] * len(new), new, strict=True)
            ]
        return sums

    return total


def _differ(a: np.ndarray | None, b: np.ndarray | None, tolerance: float = 0.0) -> bool:
    """Whether two sums differ; with a tolerance, by more than rounding."""
    if a is None or b is None:
        return False
    near = np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b))
    return bool(np.any(~near & ~((a == b) | (np.isnan(a) & np.isnan(b)))))


def _parallel(push: np.ndarray, grad: ArrayLike) -> bool:
    """Whether an update points along the gradient, up the loss."""
    with np.errstate(all="ignore"):
        a, b = push.ravel(), wide(grad).ravel()
        cosine = np.vdot(a, b).real / (np.linalg.norm(a) * np.linalg.norm(b))
    return bool(cosine > 0.5)


def _is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
