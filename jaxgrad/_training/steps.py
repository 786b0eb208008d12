"""Many steps of training as one jitted call, with the frozen part run beforehand if that pays.

The number of steps in a call is a value and not a shape: a call of three steps and one of three
hundred are the same program, so that a run that was interrupted anywhere goes on to the same bits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._optim.apply_updates import apply_updates
from jaxgrad._tree.flat import PyTree


def compile_steps(
    objective: Callable[..., Any],
    tx: optax.GradientTransformation,
    skip: int,
    pinned: Any = None,
) -> Callable[..., tuple[Any, jax.Array, jax.Array]]:
    """The jitted call; it compiles once for each number of rows in a step.

    Args:
        objective: see `Plan`.
        tx: the optimizer.
        skip: how many consecutive steps may not be finite; after one more, nothing moves.
        pinned: the shardings of the results, if there is a mesh.

    Returns:
        `run(carry, held, data, batches, key, (first, n)) -> (carry, losses, finite)`. The carry is
        `(trainable, opt_state, steps in a row that were not finite)`, and its buffers are taken
        over; `batches` says which rows of `data` each step has; `n` steps are taken, the first of
        them numbered `first`; the objective is passed a key if there is one.
    """

    def run(
        carry: Any,
        held: PyTree,
        data: PyTree,
        batches: jax.Array,
        key: jax.Array | None,
        span: tuple[jax.Array, jax.Array],
    ) -> tuple[Any, jax.Array, jax.Array]:
        first, n = span

        def step(i: jax.Array, loop: Any) -> Any:
            (trainable, opt_state, lost), losses, finite = loop
            batch = jax.tree.map(lambda x: x[batches[i]], data)
            extra = {"key": jax.random.fold_in(key, first + i)} if key is not None else {}
            value, grads = objective(trainable, held, batch, **extra)
            updates, moved = tx.update(grads, opt_state, trainable)
            good = _all_finite((value, grads))
            new = (apply_updates(trainable, updates), moved)
            new = _where(good & (lost <= skip), new, (trainable, opt_state))
            lost = jnp.where(lost > skip, lost, jnp.where(good, 0, lost + 1))
            return (
                (*new, lost),
                losses.at[i].set(value.astype(losses.dtype)),
                finite.at[i].set(good),
            )

        # As wide as JAX is configured to be, so that any loss fits.
        losses = jnp.zeros(len(batches), jax.dtypes.canonicalize_dtype(np.float64))
        finite = jnp.zeros(len(batches), bool)
        return jax.lax.fori_loop(0, n, step, (carry, losses, finite))

    return jax.jit(run, donate_argnums=0, out_shardings=pinned)


# Elements of a leaf that is joined with others for the check; joining copies.
_SMALL = 4096


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether every element of a tree is finite: its product with zero is zero.

    The small leaves are summed as one array. With a reduction for each, and by `isfinite`, a third
    of the time to compile the steps of a Transformer's last blocks went into this check.
    """
    parts: dict[Any, list[jax.Array]] = {}
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            part = x.ravel() if x.size <= _SMALL else jnp.sum(0 * x)[None]
            parts.setdefault(x.dtype, []).append(part)
    sums = (jnp.sum(0 * jnp.concatenate(part)) for part in parts.values())
    return jnp.array([jnp.isfinite(total) for total in sums]).all()


def _where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
