"""The loss of a training in one form, whatever it takes and returns beside params and batch."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxgrad._autograd.loss import GradientError, call_loss, scalar_value
from jaxgrad._functional.statistics import MARK
from jaxgrad._jaxpr.inline import inline
from jaxgrad._jaxpr.views import bodies
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import (
    PyTree,
    abstract,
    check_same_structure,
    flatten,
    is_hole,
    is_value,
)
from jaxgrad._tree.selection import Selection
from jaxgrad._tree.types import Batch, Loss, Params

# What an entry of the history holds beside metrics.
_TAKEN = ("step", "epoch", "loss", "rows_per_s", "skipped")


class Aux(NamedTuple):
    """What an objective returns beside its value."""

    stats: PyTree
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss as `objective(params, batch, **given) -> (value, Aux)`.

    Attributes:
        loss: the loss as its author wrote it.
        takes_stats: whether it takes `stats` and returns new ones.
        has_aux: whether it returns metrics.
    """

    loss: Loss
    takes_stats: bool = False
    has_aux: bool = False

    def __call__(self, params: Params, batch: Batch, **given: Any) -> tuple[jax.Array, Aux]:
        out = call_loss(self.loss, params, (batch,), given)
        value, stats, metrics = self._parts(out)
        if self.takes_stats:
            stats = _like(given["stats"], stats)
        return scalar_value(value), Aux(stats, _metrics(metrics))

    def _parts(self, out: Any) -> tuple[Any, PyTree, Any]:
        match self.takes_stats, self.has_aux, out:
            case False, False, value:
                return value, None, {}
            case True, False, (value, stats):
                return value, stats, {}
            case False, True, (value, metrics):
                return value, None, metrics
            case True, True, (value, (stats, metrics)):
                return value, stats, metrics
        wanted, why = "(value, metrics)", "has_aux=True"
        if self.takes_stats:
            wanted = "(value, (new_stats, metrics))" if self.has_aux else "(value, new_stats)"
            why = f"it takes stats and {why}" if self.has_aux else "it takes stats"
        found = spec(out) if is_value(out) else type(out).__name__
        raise GradientError(f"the loss returns {found}. Because {why}, it must return {wanted}.")


def takes(loss: Loss, name: str, value: object, example: str) -> bool:
    """Whether a loss is passed a value by keyword.

    A parameter keeps a default other than `None`, and `None` too if there is no value.

    Args:
        loss: the loss.
        name: the name of the parameter.
        value: what `fit` was given for it; None if nothing.
        example: the argument of `fit` that gives it, as code.

    Raises:
        ValueError: the loss needs a value and there is none.
    """
    parameter = inspect.signature(loss).parameters.get(name)
    if parameter is None:
        return False
    needed = parameter.default is inspect.Parameter.empty
    if needed and value is None:
        raise ValueError(
            f"the loss takes an argument {name!r}, but fit was passed none: fit(..., {example})."
        )
    return value is not None and (needed or parameter.default is None)


def traced(
    objective: Callable[..., tuple[jax.Array, Aux]], *args: PyTree, **given: Any
) -> tuple[Callable[..., tuple[jax.Array, Aux]], Aux]:
    """The function, traced once: it runs its jaxpr; and the shapes of what it returns as `Aux`.

    Args:
        objective: `objective(*args, **given)`.
        *args: its arguments, or their shapes.
        **given: its arguments by keyword, among them `stats` if it takes any.

    Raises:
        GradientError: it moves statistics and does not return them.
    """
    program, out = jax.make_jaxpr(objective, return_shape=True)(*args, **given)
    _refuse_dropped(program, given.get("stats"))
    run, structure = jex.jaxpr_as_fun(program), jax.tree.structure(out)

    def again(*args: PyTree, **given: Any) -> tuple[jax.Array, Aux]:
        outs = run(*jax.tree.leaves((args, given)))
        return jax.tree.unflatten(structure, map(jnp.asarray, outs))  # some are Python numbers

    return again, out[1]


def moving(
    objective: Objective, params: Params, batch: Batch, given: Mapping[str, Any]
) -> Selection:
    """Which statistics a loss may move, from its jaxpr: a selection of `given["stats"]`.

    Args:
        objective: the loss.
        params: all parameters.
        batch: a batch, or its shapes.
        given: what the loss takes by keyword.
    """
    stats = given.get("stats")
    flat = flatten(stats)
    if not jax.tree.leaves(stats):
        return Selection(abstract(flat), (False,) * len(flat.leaves))

    def of_stats(batch: Batch, stats: PyTree) -> tuple[jax.Array, Aux]:
        return objective(params, batch, **{**given, "stats": stats})

    moves = iter(_moves(jax.make_jaxpr(of_stats)(batch, stats), stats))
    return Selection(abstract(flat), tuple(not is_hole(x) and next(moves) for x in flat.leaves))


def _moves(program: jex.ClosedJaxpr, stats: PyTree) -> list[bool]:
    """Whether each leaf of the statistics, the last inputs of an objective, is not returned."""
    count = len(jax.tree.leaves(stats))
    inlined = inline(program, [True] * len(program.in_avals))
    before = inlined.invars[len(inlined.invars) - count :]
    after = inlined.jaxpr.outvars[1 : 1 + count]
    return [new is not old for new, old in zip(after, before, strict=True)]


def _refuse_dropped(program: jex.ClosedJaxpr, stats: PyTree) -> None:
    """Raises if an objective moves statistics, the last of its inputs, and does not return them."""
    paths = [f"'{path}'" for path in dict.fromkeys(_marked(program.jaxpr))]
    if not paths or any(_moves(program, stats)):
        return
    if jax.tree.leaves(stats):
        raise GradientError(
            f"the loss moves the statistics {listed(paths)} and returns them as they were. Return "
            "the new ones: `out, stats = apply.train(params, x, stats=stats)`, then "
            "`return value, stats`."
        )
    raise GradientError(
        f"the loss moves the statistics {listed(paths)} of layers that are trained, and drops the "
        "new ones: at inference the model would run with statistics that its weights never saw. "
        "Thread them: `def loss(params, batch, stats): out, stats = apply.train(params, ..., "
        "stats=stats); ...; return value, stats`, and `fit(..., stats=apply.stats)`. Or keep these "
        "layers in inference mode: `apply(params, ...)`."
    )


def _marked(jaxpr: jex.Jaxpr) -> Iterator[str]:
    """The paths of the statistics that `apply.train` moves in a program."""
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith(MARK):
            yield name.removeprefix(MARK)
        for body in bodies(eqn):
            yield from _marked(body.jaxpr)


def _like(old: PyTree, new: PyTree) -> PyTree:
    """New statistics, if they are of the structure, shapes and dtypes of the old ones."""
    before, after = flatten(old), flatten(new)
    check_same_structure(before, after, "stats", "what the loss returns as stats", GradientError)
    for path, x, y in zip(before.paths, before.leaves, after.leaves, strict=True):
        if is_value(x) and (not is_value(y) or spec(x) != spec(y)):
            found = spec(y) if is_value(y) else type(y).__name__
            raise GradientError(
                f"the loss is given stats with '{path}' {spec(x)}, and returns {found}. Return "
                "statistics of the same shapes and dtypes."
            )
    return new


def _metrics(metrics: Any) -> dict[str, jax.Array]:
    if not isinstance(metrics, Mapping):
        raise GradientError(
            f"has_aux=True: the loss returns {type(metrics).__name__} beside its value. It must be "
            'a dict of scalars, {"accuracy": ...}.'
        )
    scalars: dict[str, jax.Array] = {}
    for name, x in metrics.items():
        real = is_value(x) and not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
        if not real or jnp.shape(x) != ():
            found = spec(x) if is_value(x) else type(x).__name__
            raise GradientError(
                f"has_aux=True: the metric {name!r} is {found}. A metric is a real scalar, whose "
                "mean goes into the history: reduce it (jnp.mean)."
            )
        if not isinstance(name, str) or name in _TAKEN:
            taken = listed(map(repr, _TAKEN))
            raise GradientError(
                f"has_aux=True: {name!r} can't name a metric. A name is a string and not one of "
                f"{taken}, which the history has of its own."
            )
        scalars[name] = jnp.asarray(x)
    return scalars
