"""Gradients of a batch as the mean over its parts, accumulated in a scan in at least float32.

Parts have weights if the loss is a mean over something else than examples: over tokens, of which
each part has another number. The shares of the parts are known before the first gradient, so what
is accumulated is as large as one gradient, and a part without tokens, whose own mean is 0 / 0, is
left out.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgrad._autograd.loss import GradientError
from jaxgrad._autograd.rows import (
    RowsOption,
    check_option,
    check_parts,
    check_weight,
    has_rows,
    place_of_value,
)
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array, is_key, is_value
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import common_rows


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How a batch is split, and how its parts are put together.

    Attributes:
        parts: their number.
        weight: of a part, by the arguments of the loss after the parameters; None for equal ones.
        rows: whether the loss is checked to be a mean of its parts.
    """

    parts: int
    weight: Callable[..., ArrayLike] | None
    rows: RowsOption

    def __post_init__(self) -> None:
        check_option(self.rows)
        if self.parts < 1:
            raise GradientError(f"microbatches={self.parts}; it must be 1 or more, or None.")

    def check(
        self, fun: Callable[..., Any], selected: PyTree, args: tuple, kwargs: dict, rows: int
    ) -> None:
        """Refuses a loss of so many rows that is not the mean of its parts, from its trace."""
        if self.rows == "independent" or self.parts == 1 or not rows:
            return
        weight, sizes = self.weight, {"rows": rows, "part": rows // self.parts}
        place = place_of_value(lambda *given: fun(*given)[0], selected, args, kwargs, **sizes)
        check_parts(place, self.parts, weighted=weight is not None)
        if weight is not None:
            of_batch = functools.partial(_weight_of, weight)
            check_weight(place_of_value(of_batch, None, args, {}, **sizes))

    def shares(self, split: PyTree, whole: PyTree) -> jax.Array | None:
        """The share of each part in the batch; None if there are no weights."""
        weight = self.weight
        if weight is None:
            return None
        weights = jax.lax.map(lambda part: _weight_of(weight, None, *merge(part, whole)), split)
        total = weights.sum()
        # Without any weight the parts count alike, and the loss says what it is of such a batch.
        return jnp.where(total == 0, 1 / self.parts, weights / jnp.where(total == 0, 1, total))


def accumulate(
    how: Microbatches,
    fun: Callable[..., Any],
    differentiate: Callable[..., Any],
    selected: PyTree,
    args: tuple,
    kwargs: dict,
) -> tuple[jax.Array, Any, PyTree, jax.Array]:
    """Means over the parts of the batch; the carry holds one gradient of the selected leaves.

    Args:
        how: the parts.
        fun: from the selected leaves, `args` and `kwargs` to `(value, aux)`.
        differentiate: from the same to `((value, aux), grads)`.
        selected: the leaves to differentiate in.
        args: have the batch.
        kwargs: go to each part whole.

    Returns:
        The value, what is beside it, the gradients, and the shares of the parts.
    """
    split, whole, rows = _microbatches(args, kwargs, how.parts)
    how.check(fun, selected, args, kwargs, rows)
    shares = how.shares(split, whole)
    # Sums of many small gradients lose precision in half precision.
    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(jnp.result_type(x))), selected)

    def step(total: PyTree, given: PyTree) -> tuple[PyTree, tuple[jax.Array, Any]]:
        part, share = given
        (value, aux), grads = differentiate(selected, *merge(part, whole))
        if share is None:
            return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (value, aux)
        total = jax.tree.map(lambda t, g: t + shared(g.astype(t.dtype), share), total, grads)
        return total, (value, aux)

    total, (values, aux) = jax.lax.scan(step, total, (split, shares), length=how.parts)
    if shares is None:
        value, shares = values.mean(), jnp.full(how.parts, 1 / how.parts)
        total = jax.tree.map(lambda t: t / how.parts, total)
    else:
        value = shared(values.astype(_wide(values.dtype)), shares).sum().astype(values.dtype)
    grads = jax.tree.map(lambda t, x: t.astype(jnp.result_type(x)), total, selected)
    return value, aux, grads, shares


def shared(x: jax.Array, share: jax.Array) -> jax.Array:
    """What a part adds: `x` times its share, and nothing of a part without one, NaN included."""
    share = share.reshape(share.shape + (1,) * (x.ndim - share.ndim))
    return jnp.where(share == 0, jnp.zeros_like(x), x * share.astype(x.dtype))


def _weight_of(
    weight: Callable[..., ArrayLike], _: None, args: Sequence[Any], kwargs: dict
) -> jax.Array:
    """The weight of a batch; it does not take the keywords of the loss."""
    del kwargs
    try:
        inspect.signature(weight).bind(*args)
    except TypeError as error:
        raise GradientError(
            "weight is called with the positional arguments of the loss after the parameters, here "
            f"{len(args)}: {error}. Write weight=lambda batch: ... for a loss(params, batch)."
        ) from None
    except ValueError:
        pass  # a function without a signature
    value = weight(*args)
    numeric = is_value(value) and not is_key(value)
    if not numeric or jnp.shape(value) or jnp.iscomplexobj(value):
        found = spec(value) if is_value(value) else type(value).__name__
        raise GradientError(
            f"weight returns {found}; it must return a real scalar, how much the part counts, as "
            "jnp.sum(batch['mask'])."
        )
    return jnp.asarray(value, jax.dtypes.canonicalize_dtype(np.float64))


_MUST_SPLIT = (
    "microbatches: the arrays in positional arguments",
    "Pass what every part needs whole by keyword.",
)


def _microbatches(args: tuple, kwargs: dict, parts: int) -> tuple[PyTree, PyTree, int]:
    """What differs from part to part, stacked along a new first axis, what does not, the rows."""
    flat = flatten((args, kwargs))
    leaves = list(flat.leaves)
    keys = {i for i, leaf in enumerate(leaves) if is_key(leaf) and leaf.ndim == 0}
    batch = [i for i, leaf in enumerate(leaves) if has_rows(flat.paths[i], leaf)]
    differs = [i in keys or i in batch for i in range(len(leaves))]
    for i in keys:
        leaves[i] = jax.random.split(leaves[i], parts)
    shapes = {flat.paths[i].partition("/")[2]: leaves[i].shape for i in batch}
    rows = common_rows(shapes, *_MUST_SPLIT) if shapes else 0
    if rows % parts:
        first = next(iter(shapes))
        raise GradientError(
            f"microbatches={parts} does not divide the {rows} rows of argument '{first}'."
        )
    for i in batch:
        leaves[i] = leaves[i].reshape(parts, rows // parts, *leaves[i].shape[1:])
    whole = [
        path.partition("/")[2]
        for path, leaf, differ in zip(flat.paths, flat.leaves, differs, strict=True)
        if is_array(leaf) and jnp.ndim(leaf) > 0 and not differ
    ]
    if not batch and (whole or not any(differs)):
        raise GradientError(
            f"microbatches={parts}, but no positional argument can be split"
            + (f": {listed(map(repr, whole))} would go to each part whole" if whole else "")
            + ". Pass the batch by position: loss_and_grad(params, batch)."
        )
    return *halves(dataclasses.replace(flat, leaves=leaves), differs), rows


def _wide(dtype: Any) -> Any:
    return jnp.float32 if dtype.itemsize < 4 else dtype
