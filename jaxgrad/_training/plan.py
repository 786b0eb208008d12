"""Whether a run is staged, decided once, and all that its steps need to know."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad._autograd.grad import value_and_grad
from jaxgrad._autograd.loss import checked
from jaxgrad._devices.placement import OnMesh, Placement
from jaxgrad._staging.precompute import place_for
from jaxgrad._staging.stage import Staged, StageError
from jaxgrad._staging.stage import stage as stage_loss
from jaxgrad._text import count, size
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.selection import Selection


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
    selection: Selection,
    dataset: PyTree,
    batch_size: int,
    extra: Mapping[str, Any],
    epochs: int,
    stage: bool | None,
    progress: bool,
    place: Placement,
) -> Plan:
    """The plan of a training; `stage` is `None` for where it pays, else what to do if one can."""
    plan = _unstaged(loss, params, selection, dataset)
    if stage is False or not epochs or not jax.tree.leaves(plan.held):
        return plan
    batch = _abstract(dataset, min(batch_size, rows_of(dataset)))
    return _staged(
        plan, loss, params, selection, dataset, batch, extra, epochs, stage is None, progress, place
    )


def _unstaged(
    loss: Callable[..., Any], params: PyTree, selection: Selection, dataset: PyTree
) -> Plan:
    flat = flatten(selection.split(params)[1])
    frozen, static = halves(flat, [is_array(leaf) for leaf in flat.leaves])
    differentiate = value_and_grad(loss, wrt=selection)

    def objective(trainable: PyTree, frozen: PyTree, batch: PyTree, **extra: Any) -> Any:
        return differentiate(merge(trainable, frozen, static), batch, **extra)

    return Plan(objective, frozen, dataset, "nothing is staged")


def _staged(
    unstaged: Plan,
    loss: Callable[..., Any],
    params: PyTree,
    selection: Selection,
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
        staged = stage_loss(positional, params, batch, selection, vary=tuple(extra.values()))
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


def _abstract(dataset: PyTree, rows: int) -> PyTree:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(
            x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        )
        return jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), dtype)

    return jax.tree.map(leaf, dataset)
