"""Many steps of training as one jitted call, with the frozen part run beforehand where it pays.

The number of steps in a call is a value and not a shape: a call of three steps and one of three
hundred are the same program, so that a run that was interrupted anywhere goes on to the same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._autograd import checked, value_and_grad
from jaxgrad._messages import count, size
from jaxgrad._optim import apply_updates
from jaxgrad._prepare import place_for
from jaxgrad._select import (
    PyTree,
    Wrt,
    flatten,
    halves,
    is_array,
    is_hole,
    merge,
    partition,
    select,
)
from jaxgrad._sharding import OnMesh, Placement
from jaxgrad._stage import Staged, StageError
from jaxgrad._stage import stage as stage_loss


class Plan(NamedTuple):
    """How a step gets its loss and gradients: `objective(trainable, held, batch, **extra)`."""

    objective: Callable[..., tuple[jax.Array, PyTree]]
    held: PyTree  # what the objective needs beside the trainable half
    data: PyTree  # batches of which it takes
    line: str
    staged: bool = False


def make_plan(
    loss: Callable[..., Any],
    params: PyTree,
    wrt: Wrt,
    dataset: PyTree,
    batch_size: int,
    extra: Mapping[str, Any],
    epochs: int,
    stage: bool | None,
    progress: bool,
    place: Placement,
) -> Plan:
    """The plan of a training; `stage` is `None` for where it pays, else what to do if one can."""
    plan = _unstaged(loss, params, wrt, dataset)
    if stage is False or not epochs or not jax.tree.leaves(plan.held):
        return plan
    batch = _abstract(dataset, min(batch_size, rows_of(dataset)))
    return _staged(
        plan, loss, params, wrt, dataset, batch, extra, epochs, stage is None, progress, place
    )


def rows_of(dataset: PyTree) -> int:
    """The number of rows, which all arrays of a dataset have."""
    flat = flatten(dataset)
    sizes = {
        path: np.shape(leaf)[0] if np.ndim(leaf) else 0
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not is_hole(leaf)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"'{path}' {n}" for path, n in sizes.items()) or "no array"
        raise ValueError(
            f"the arrays of a dataset share their first axis, its rows; this one has {found}."
        )
    return next(iter(sizes.values()))


def _unstaged(loss: Callable[..., Any], params: PyTree, wrt: Wrt, dataset: PyTree) -> Plan:
    flat = flatten(partition(params, wrt)[1])
    frozen, static = halves(flat, [is_array(leaf) for leaf in flat.leaves])
    differentiate = value_and_grad(loss, wrt=select(params, wrt))

    def objective(trainable: PyTree, frozen: PyTree, batch: PyTree, **extra: Any) -> Any:
        return differentiate(merge(trainable, frozen, static), batch, **extra)

    return Plan(objective, frozen, dataset, "nothing is staged")


def _staged(
    unstaged: Plan,
    loss: Callable[..., Any],
    params: PyTree,
    wrt: Wrt,
    dataset: PyTree,
    batch: PyTree,
    extra: Mapping[str, Any],
    epochs: int,
    must_pay: bool,
    progress: bool,
    place: Placement,
) -> Plan:
    """The plan with the frozen part run once, where that pays; else the one that there is."""

    def positional(params: PyTree, batch: PyTree, *vary: Any) -> Any:
        return checked(loss)(params, batch, **dict(zip(extra, vary, strict=True)))

    def objective(trainable: PyTree, staged: Staged, features: PyTree, **extra: Any) -> Any:
        of_trainable = value_and_grad(lambda t: staged.loss(t, features, *extra.values()))
        return of_trainable(trainable)

    on_mesh = isinstance(place, OnMesh)  # rows come from the host there
    try:
        staged = stage_loss(positional, params, batch, wrt, vary=tuple(extra.values()))
        report, rows = staged.report(), rows_of(dataset)
        gain, need = report.gain(rows, epochs), rows * report.nbytes
        if not report.staged:
            why = str(report.refusals[0][0]) if report.refusals else "no frozen part takes long"
        elif must_pay and gain <= 1:
            passes = count(range(epochs), "epoch", verb=False)
            why = f"{passes} of {rows:,} rows would not gain by it"
        elif place_for("auto", need, None) != "device" and not on_mesh:
            why = f"the features take {size(need)}, more than there is room for"
        else:
            where, chunk = "host" if on_mesh else "device", place.rows(rows_of(batch))
            features = staged.prepare(dataset, where, progress=progress, sharding=chunk)
            line = f"the frozen part runs once per row ({size(need)} of features): "
            line += f"predicted {gain:.2g} times as fast, preparation included"
            return Plan(objective, staged, features, line, staged=True)
    except StageError as e:
        why = str(e)
    return unstaged._replace(line=f"nothing is staged: {why}")


def compile_steps(
    objective: Callable[..., Any],
    takes_key: bool,
    tx: optax.GradientTransformation,
    skip: int,
    pinned: Any = None,
) -> Callable[..., tuple[Any, jax.Array, jax.Array]]:
    """The jitted call; it compiles once for each number of rows in a step.

    Args:
        objective: see `Plan`.
        takes_key: whether the objective is passed a key.
        tx: the optimizer.
        skip: how many steps in a row may be no numbers; after one more, nothing moves any more.
        pinned: the shardings of what it returns, where there is a mesh.

    Returns:
        `run(carry, held, data, batches, n, key, first) -> (carry, losses, finite)`. The carry is
        `(trainable, opt_state, steps in a row that were not finite)`, and its buffers are taken
        over; `batches` says which rows of `data` each step has, of which `n` are taken; `first`
        numbers them.
    """

    def run(
        carry: Any,
        held: PyTree,
        data: PyTree,
        batches: jax.Array,
        n: jax.Array,
        key: Any,
        first: jax.Array,
    ) -> tuple[Any, jax.Array, jax.Array]:
        def step(i: jax.Array, loop: Any) -> Any:
            (trainable, opt_state, lost), losses, finite = loop
            batch = jax.tree.map(lambda x: x[batches[i]], data)
            extra = {"key": jax.random.fold_in(key, first + i)} if takes_key else {}
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

        # As wide as JAX is set up to be: any loss fits in.
        losses = jnp.zeros(len(batches), jax.dtypes.canonicalize_dtype(np.float64))
        finite = jnp.zeros(len(batches), bool)
        return jax.lax.fori_loop(0, n, step, (carry, losses, finite))

    return jax.jit(run, donate_argnums=0, out_shardings=pinned)


# Numbers in a leaf that is joined with others to be looked at; to join is to copy.
_SMALL = 4096


def _all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of a tree is one: then its product with zero is zero.

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


def _abstract(dataset: PyTree, rows: int) -> PyTree:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(
            x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        )
        return jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), dtype)

    return jax.tree.map(leaf, dataset)
