"""Gradients of a batch as the mean over its parts, accumulated in a scan in at least float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad._autograd.loss import GradientError
from jaxgrad._text import listed
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array, is_key
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import common_rows


def accumulate(
    differentiate: Callable[..., Any], selected: PyTree, args: tuple, kwargs: dict, parts: int
) -> tuple[jax.Array, Any, PyTree]:
    """Means over the parts of the batch; the carry holds one gradient of the selected leaves."""
    split, whole = _microbatches(args, kwargs, parts)
    # Sums of many small gradients lose precision in half precision.
    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(jnp.result_type(x))), selected)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, tuple[jax.Array, Any]]:
        (value, aux), grads = differentiate(selected, *merge(part, whole))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (value, aux)

    total, (values, aux) = jax.lax.scan(step, total, split, length=parts)
    grads = jax.tree.map(lambda t, x: (t / parts).astype(jnp.result_type(x)), total, selected)
    return values.mean(), aux, grads


_MUST_SPLIT = (
    "microbatches: the arrays in positional arguments",
    "Pass what every part needs whole by keyword.",
)


def _microbatches(args: tuple, kwargs: dict, parts: int) -> tuple[PyTree, PyTree]:
    """What differs from part to part, stacked along a new first axis, and what does not."""
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
    return halves(dataclasses.replace(flat, leaves=leaves), differs)


def has_rows(path: str, leaf: Any) -> bool:
    """Whether a leaf of `(args, kwargs)` is an array with rows in a positional argument."""
    return path.startswith("0/") and is_array(leaf) and jnp.ndim(leaf) > 0


def _wide(dtype: Any) -> Any:
    return jnp.float32 if dtype.itemsize < 4 else dtype
