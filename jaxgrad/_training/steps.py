"""Many steps of training as one jitted call.

The number of steps in a call is a value and not a shape: a call of three steps and one of three
hundred are the same program, so that a run that was interrupted anywhere goes on to the same bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._optim.apply_updates import apply_updates
from jaxgrad._optim.extra_args import with_extra_args
from jaxgrad._training.objective import Aux, traced
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.types import OptState, Params


class Carry(NamedTuple):
    """What changes from step to step."""

    trainable: Params
    opt_state: OptState
    stats: PyTree
    lost: jax.Array  # how many of the last steps were not finite


class Taken(NamedTuple):
    """What the steps of a call recorded, one entry for each step there is room for."""

    losses: jax.Array
    finite: jax.Array
    metrics: dict[str, jax.Array]


def compile_steps(
    objective: Callable[..., tuple[jax.Array, Aux]],
    tx: optax.GradientTransformation,
    skip: int,
    pinned: Any = None,
) -> Callable[..., tuple[Carry, Taken]]:
    """The jitted call; it compiles once for each number of rows in a step.

    Args:
        objective: see `Plan`.
        tx: the optimizer; it is passed `value`, `grad` and `value_fn` if it takes them.
        skip: how many consecutive steps may not be finite; after one more, nothing moves.
        pinned: the shardings of the results, if there is a mesh.

    Returns:
        `run(carry, held, data, batches, key, (first, n)) -> (carry, taken)`. The buffers of the
        carry are taken over; `batches` says which rows of `data` each step has; `n` steps are
        taken, the first of them numbered `first`; the objective is passed a key if there is one.
    """
    tx = with_extra_args(tx)

    def run(
        carry: Carry,
        held: PyTree,
        data: PyTree,
        batches: jax.Array,
        key: jax.Array | None,
        span: tuple[jax.Array, jax.Array],
    ) -> tuple[Carry, Taken]:
        first, n = span

        def arguments(i: Any, carry: Carry) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
            batch = jax.tree.map(lambda x: x[batches[i]], data)
            given = {} if key is None else {"key": jax.random.fold_in(key, first + i)}
            if carry.stats is not None:
                given["stats"] = carry.stats
            return (carry.trainable, held, batch), given

        args, given = jax.eval_shape(lambda: arguments(0, carry))
        loss, shapes = traced(objective, *args, **given)

        def step(i: jax.Array, loop: tuple[Carry, Taken]) -> tuple[Carry, Taken]:
            old, taken = loop
            (_, *fixed), given = arguments(i, old)
            differentiate = jax.value_and_grad(loss, has_aux=True)
            (value, aux), grads = differentiate(old.trainable, *fixed, **given)
            updates, opt_state = tx.update(
                grads,
                old.opt_state,
                old.trainable,
                value=value,
                grad=grads,
                value_fn=lambda trainable: loss(trainable, *fixed, **given)[0],
            )
            good = _all_finite((value, grads))
            lost = jnp.where(old.lost > skip, old.lost, jnp.where(good, 0, old.lost + 1))
            new = Carry(apply_updates(old.trainable, updates), opt_state, aux.stats, lost)
            new = _where(good & (old.lost <= skip), new, old._replace(lost=lost))
            found = Taken(value, good, aux.metrics)
            taken = jax.tree.map(lambda all, x: all.at[i].set(x.astype(all.dtype)), taken, found)
            return new, taken

        # As wide as JAX is configured to be, so that any loss fits.
        room = jnp.zeros(len(batches), jax.dtypes.canonicalize_dtype(np.float64))
        metrics = {name: room for name in shapes.metrics}
        taken = Taken(room, jnp.zeros(len(batches), bool), metrics)
        return jax.lax.fori_loop(0, n, step, (carry, taken))

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
