"""Why an optimizer moves a parameter, found by experiment.

The name of a transformation says little about a chain of them, under a mask, in a wrapper. So the
chain is run with one thing changed at a time, and what changes with it is the cause:

- no gradient, and no value: what still moves is *noise*;
- no gradient, and the value: what moves more is *decay*;
- no gradient, no value, and the state after some steps: what moves more is *momentum*;
- the gradient: what moves more is the *gradient*; where it moves along the gradient and not
  against it, the *raw gradient*, as `optax.masked` passes it through;
- the gradients of frozen leaves a thousand times larger: where that changes the steps of a
  trained leaf, they have a share in it, by a norm.
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
    """What moves the leaves.

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
        steps: how many updates to look at, for what acts only every so many steps.
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
    """The sum of some updates by one gradient, for each leaf; None for a hole."""
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
    """Whether two sums differ; rounding is none of our business where a tolerance is given."""
    if a is None or b is None:
        return False
    near = np.abs(a - b) <= tolerance * np.maximum(np.abs(a), np.abs(b))
    return bool(np.any(~near & ~((a == b) | (np.isnan(a) & np.isnan(b)))))


def _parallel(push: np.ndarray, grad: ArrayLike) -> bool:
    """Whether a leaf is pushed along its gradient, up the loss."""
    with np.errstate(all="ignore"):
        a, b = push.ravel(), wide(grad).ravel()
        cosine = np.vdot(a, b).real / (np.linalg.norm(a) * np.linalg.norm(b))
    return bool(cosine > 0.5)


def _is_float(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))
