"""Whether a run is staged, decided once, and all that its steps need to know."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxgrad._devices.placement import OnMesh
from jaxgrad._staging.precompute import place_for
from jaxgrad._staging.stage import Staged, StageError
from jaxgrad._staging.stage import stage as stage_loss
from jaxgrad._text import count, size
from jaxgrad._training.job import Job
from jaxgrad._training.objective import Aux, moving
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.types import Batch, Params


class Plan(NamedTuple):
    """How a step gets its loss: `objective(trainable, held, batch, **given) -> (value, Aux)`."""

    objective: Callable[..., tuple[jax.Array, Aux]]
    held: PyTree  # what the objective needs besides the trainable half
    data: Batch  # whose batches it takes
    line: str
    staged: bool = False


def make_plan(job: Job, params: Params, stats: PyTree, was_staged: bool | None) -> Plan:
    """The plan of a training.

    Args:
        job: the call of `fit`.
        params: all parameters, in their places.
        stats: the statistics, in their places; None if the loss takes none.
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
        must_pay = job.stage == "auto" and was_staged is None
        plan = _staged(job, params, stats, must_pay)
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

    def objective(trainable: PyTree, frozen: PyTree, batch: Batch, **given: Any) -> Any:
        return job.objective(merge(trainable, frozen, static), batch, **given)

    return Plan(objective, frozen, job.dataset, "nothing is staged")


def _staged(job: Job, params: Params, stats: PyTree, must_pay: bool) -> Plan | str:
    """The plan with the frozen part run once, or why there is none."""
    given = {**job.given, "stats": stats} if "stats" in job.given else job.given
    batch = job.batch()
    # The statistics of layers in inference mode never move: as constants they block no staging.
    moves = moving(job.objective, params, batch, given)
    _, still = moves.split(given.get("stats"))

    def vary(given: Mapping[str, Any]) -> list[Any]:
        return [moves.split(given[n])[0] if n == "stats" else given[n] for n in job.given]

    def positional(params: Params, batch: Batch, *vary: Any) -> Any:
        named = dict(zip(job.given, vary, strict=True))
        if "stats" in named:
            named["stats"] = moves.merge(named["stats"], still)
        value, aux = job.objective(params, batch, **named)
        return value, aux._replace(stats=moves.split(aux.stats)[0])

    def objective(trainable: PyTree, staged: Staged, features: PyTree, **given: Any) -> Any:
        value, aux = staged.loss(trainable, features, *vary(given))
        return value, aux._replace(stats=moves.merge(aux.stats, still))

    batch = job.batch()
    on_mesh = isinstance(job.place, OnMesh)  # rows come from the host there
    try:
        staged = stage_loss(positional, params, batch, job.selection, vary=vary(given))
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
