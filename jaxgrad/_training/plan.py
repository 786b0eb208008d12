"""Whether a run is staged, decided once, and all that its steps need to know."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxgrad._autograd.grad import value_and_grad
from jaxgrad._autograd.loss import checked
from jaxgrad._devices.placement import OnMesh
from jaxgrad._staging.precompute import place_for
from jaxgrad._staging.stage import Staged, StageError
from jaxgrad._staging.stage import stage as stage_loss
from jaxgrad._text import count, size
from jaxgrad._training.job import Job
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.types import Batch, Grads, Params


class Plan(NamedTuple):
    """How a step gets its loss and gradients: `objective(trainable, held, batch, **extra)`."""

    objective: Callable[..., tuple[jax.Array, Grads]]
    held: PyTree  # what the objective needs besides the trainable half
    data: Batch  # whose batches it takes
    line: str
    staged: bool = False


def make_plan(job: Job, params: Params, was_staged: bool | None) -> Plan:
    """The plan of a training.

    Args:
        job: the call of `fit`.
        params: all parameters, in their places.
        was_staged: whether the run that is resumed was staged; None leaves that open.

    Raises:
        StageError: `stage=True`, and the loss can't be staged.
    """
    unstaged = _unstaged(job, params)
    off = job.stage is False or (job.stage == "auto" and was_staged is False)
    if off or not job.epochs:
        return unstaged
    if job.streams or not jax.tree.leaves(unstaged.held):
        if job.stage == "auto":
            return unstaged
        why = "the dataset is a stream" if job.streams else "no parameter is frozen"
    else:
        plan = _staged(job, params, must_pay=job.stage == "auto" and was_staged is None)
        if isinstance(plan, Plan):
            return plan
        why = plan
    if job.stage == "auto":
        return unstaged._replace(line=f"nothing is staged: {why}")
    raise StageError(
        f"fit(..., stage=True) can't stage the loss: {why}. With stage='auto' it trains unstaged."
    )


def _unstaged(job: Job, params: Params) -> Plan:
    flat = flatten(job.selection.split(params)[1])
    frozen, static = halves(flat, [is_array(leaf) for leaf in flat.leaves])
    differentiate = value_and_grad(job.loss, wrt=job.selection)

    def objective(trainable: PyTree, frozen: PyTree, batch: PyTree, **extra: Any) -> Any:
        return differentiate(merge(trainable, frozen, static), batch, **extra)

    return Plan(objective, frozen, job.dataset, "nothing is staged")


def _staged(job: Job, params: Params, must_pay: bool) -> Plan | str:
    """The plan with the frozen part run once, or why there is none."""
    names = [*job.extra]

    def positional(params: PyTree, batch: PyTree, *vary: Any) -> Any:
        return checked(job.loss)(params, batch, **dict(zip(names, vary, strict=True)))

    def objective(trainable: PyTree, staged: Staged, features: PyTree, **extra: Any) -> Any:
        of_trainable = value_and_grad(lambda t: staged.loss(t, features, *extra.values()))
        return of_trainable(trainable)

    batch, vary = job.batch(), tuple(job.extra.values())
    on_mesh = isinstance(job.place, OnMesh)  # rows come from the host there
    try:
        staged = stage_loss(positional, params, batch, job.selection, vary=vary)
        report = staged.report()
        gain, need = report.gain(job.rows, job.epochs), job.rows * report.nbytes
        if not report.staged:
            return str(report.refusals[0][0]) if report.refusals else "the frozen part is too cheap"
        if must_pay and gain <= 1:
            passes = count(range(job.epochs), "epoch", verb=False)
            return f"{passes} of {job.rows:,} rows would not pay for it"
        if place_for("auto", need, None) != "device" and not on_mesh:
            return f"the features take {size(need)}, more than fits in memory"
        where, chunk = "host" if on_mesh else "device", job.place.rows(rows_of(batch))
        features = staged.prepare(job.dataset, where, progress=job.progress, sharding=chunk)
    except StageError as e:
        return str(e)
    line = f"the frozen part runs once per row ({size(need)} of features): "
    line += f"predicted {gain:.2g} times as fast, preparation included"
    return Plan(objective, staged, features, line, staged=True)
