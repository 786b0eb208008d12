"""Checks that a loss treats each example of its batch by itself, before its parts are trusted.

The gradient of a batch is the mean of the gradients of its parts if the loss is a mean over
examples. If the examples mix it is not: BatchNorm in training mode leaves nothing of a batch of
one, and its gradient is exactly zero. Nothing in the result shows that. So the loss is traced at
two batch sizes, once per compilation and without running it, and the examples are followed to its
value (`follow_rows.py`).

The check reads the loss and not the derivatives that a `custom_vjp` or `hook` brings along.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import numpy as np
from jax.extend import core as jex

from jaxgrad._autograd.follow_rows import constant, follow
from jaxgrad._autograd.loss import GradientError
from jaxgrad._autograd.places import MEAN, NONE, WEIGHTED, Count, Place, Rows, Shared, Sums, Unknown
from jaxgrad._jaxpr.inline import Inlined, inline
from jaxgrad._staging.dependence import Refusal
from jaxgrad._staging.two_traces import Misaligned, Sizes, align
from jaxgrad._tree.flat import PyTree, flatten, is_array

RowsOption: TypeAlias = Literal["checked", "independent"]
"""Whether a loss is checked to treat each example by itself, or is known to."""


def check_option(rows: RowsOption) -> None:
    """Refuses another word than the two."""
    if rows not in ("checked", "independent"):
        raise GradientError(
            f"rows={rows!r}; it must be 'checked', or 'independent' to say that the loss treats "
            "each example by itself."
        )


def has_rows(path: str, leaf: Any) -> bool:
    """Whether a leaf of `(args, kwargs)` is an array with rows in a positional argument."""
    return path.startswith("0/") and is_array(leaf) and np.ndim(leaf) > 0


def check_parts(place: Place, parts: int, weighted: bool) -> None:
    """Refuses a loss that is not the mean of its parts.

    Args:
        place: of the value of the loss.
        parts: how many there are.
        weighted: whether they have weights.

    Raises:
        GradientError: the examples mix, or it is a sum, or a weighted mean without the weights.
    """
    even = isinstance(place, Shared) or (isinstance(place, Sums) and place.even)
    unit = place.unit if isinstance(place, Shared | Sums) else None
    if even and (
        unit == (MEAN if isinstance(place, Sums) else NONE) or (weighted and unit == WEIGHTED)
    ):
        return
    fix = "Divide each sum over the examples by their number, as jnp.mean does."
    if isinstance(place, Unknown):
        found, fix = _said(place.because), _UNMIX
    elif not isinstance(place, Sums):
        found = "it scales with the number of rows, and not with what is in them"
    elif place.unit == WEIGHTED and even:
        found = f"it divides a sum over them ({place.source}) by a count over the batch"
        fix = (
            "Pass this count for a part, weight=lambda batch: jnp.sum(batch['mask']), which is "
            "called with the arguments of the loss after the parameters."
        )
    elif not even:
        found = f"not all of its terms are means over the examples ({place.source} is one)"
    else:
        found = f"it is a sum over them ({place.source}) that is not divided by their number"
    raise GradientError(
        f"microbatches={parts} takes the mean over the parts of the batch, so the loss must be a "
        f"mean over the examples; but {found}. {fix} If you know that it is one, "
        "say so: rows='independent'."
    )


def check_weight(place: Place) -> None:
    """Refuses a weight whose sum over the parts is not that of the batch.

    Raises:
        GradientError: it is neither a sum over the examples nor a constant.
    """
    if isinstance(place, Shared) or (isinstance(place, Sums) and place.even):
        return
    found = "it is not a sum over its examples"
    if isinstance(place, Unknown):
        found = _said(place.because)
    elif isinstance(place, Count):
        found = f"{place.source} is not a sum over its examples"
    raise GradientError(
        "weight must be a sum over the examples of a part, so that the weights of the parts add up "
        f"to that of the batch; but {found}. Return the sum itself, jnp.sum(batch['mask']): a part "
        "of weight 0 is left out. If you know that they add up, say so: rows='independent'."
    )


def check_apart(place: Place, what: str) -> None:
    """Refuses a loss in which an example has a part in the gradient of another.

    Args:
        place: of the value of the loss.
        what: what needs the examples apart.

    Raises:
        GradientError: the examples mix, or are divided by a count over all of them.
    """
    if isinstance(place, Shared | Sums) and not place.unit.counts:
        return
    if isinstance(place, Unknown):
        found, fix = _said(place.because), _UNMIX
    else:
        source = f" ({place.source})" if isinstance(place, Sums) else ""
        found = f"it divides a sum over them{source} by a count over the batch"
        fix = (
            "Divide in each row by its own count, and take the mean of the rows: "
            "jnp.mean((losses * mask).sum(1) / mask.sum(1))."
        )
    raise GradientError(
        f"{what} takes each example by itself, so the loss must not mix the examples of the batch; "
        f"but {found}. {fix} If you know that they don't mix, say so: "
        "rows='independent'."
    )


_UNMIX = (
    "Take in each example what belongs to it alone: a norm over its own features, or BatchNorm by "
    "its running statistics."
)


def place_of_value(
    fun: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict, *, rows: int, part: int
) -> Place:
    """Where the examples are in the value of a function of a batch.

    Args:
        fun: `fun(params, args, kwargs)` to a scalar.
        params: what is differentiated; any pytree of arrays.
        args: the arrays with rows are the batch.
        kwargs: are shared by all examples.
        rows: how many rows the batch has, at least two.
        part: how many rows a part has.

    Raises:
        Exception: whatever the function raises when it is traced with a part.
    """
    trace = _tracer(fun, params, args, kwargs)
    # With one row, a sum over the batch looks like no sum at all.
    sizes = (part, rows) if part > 1 else (rows, 2 * rows)
    traces = []
    for size in sizes:
        try:
            traces.append(trace(size))
        except Exception as error:
            trace(part)  # for the error of what is called
            text = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            return _unknown(f"can't be traced at {size} rows ({text})")
    (first, trained, batch), (second, *_) = traces
    try:
        align(first.jaxpr, second.jaxpr)
    except Misaligned as error:
        return _unknown(f"is not the same at {sizes[0]} and at {sizes[1]} rows: {error}")
    return _value(first, second, sizes, trained, batch)


def _said(refusal: Refusal) -> str:
    return str(refusal) if refusal.source else f"{refusal.primitive} {refusal.reason}"


def _unknown(reason: str) -> Unknown:
    return Unknown(Refusal(reason, "the loss", "", ""))


def _tracer(
    fun: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict
) -> Callable[[int], tuple[Inlined, list[jex.Var], list[jex.Var]]]:
    """A function from a number of rows to the trace, its trained inputs, and its batch."""
    trained, treedef = jax.tree.flatten(params)
    flat = flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(flat.leaves) if hasattr(leaf, "dtype")]
    batch = {i for i in arrays if has_rows(flat.paths[i], flat.leaves[i])}

    def of_arrays(trained: list[Any], values: list[Any]) -> Any:
        leaves = list(flat.leaves)
        for i, value in zip(arrays, values, strict=True):
            leaves[i] = value
        return fun(treedef.unflatten(trained), *flat.treedef.unflatten(leaves))

    def trace(rows: int) -> tuple[Inlined, list[jex.Var], list[jex.Var]]:
        avals = [jax.typeof(flat.leaves[i]) for i in arrays]
        sized = [
            aval.update(shape=(rows, *aval.shape[1:])) if i in batch else aval
            for i, aval in zip(arrays, avals, strict=True)
        ]
        closed = jax.make_jaxpr(of_arrays)([*map(jax.typeof, trained)], sized)
        inlined = inline(closed, [False] * len(closed.jaxpr.invars))
        first, others = inlined.invars[: len(trained)], inlined.invars[len(trained) :]
        return inlined, first, [v for i, v in zip(arrays, others, strict=True) if i in batch]

    return trace


def _value(
    first: Inlined, second: Inlined, sizes: Sizes, trained: list[jex.Var], batch: list[jex.Var]
) -> Place:
    places: dict[jex.Var, Place] = dict.fromkeys(first.invars, Shared())
    places |= dict.fromkeys(batch, Rows(0))
    for var, a, b in zip(first.captured, first.consts, second.consts, strict=True):
        places[var] = constant(a, b, sizes)
    inputs = [places[v] for v in first.jaxpr.invars]
    (value,) = follow(first.jaxpr, second.jaxpr, sizes, inputs, set(trained))
    return value
