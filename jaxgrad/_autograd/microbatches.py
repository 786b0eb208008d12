"""Gradients of a batch as the mean over its parts, accumulated in a scan in at least float32."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad._autograd.loss import GradientError
from jaxgrad._text import listed
from jaxgrad._tree.flat import (
    PyTree,
    flatten,
    halves,
    is_array,
    is_key,
)
from jaxgrad._tree.merge import merge


def accumulate(
    differentiate: Callable[..., Any], selected: PyTree, args: tuple, kwargs: dict, parts: int
) -> tuple[jax.Array, Any, PyTree]:
    """Means over the parts of the batch; the carry holds one gradient of the selected leaves."""
    split, whole = _microbatches(args, kwargs, parts)
    # Sums of many small gradients lose digits in half precision.
    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(jnp.result_type(x))), selected)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, tuple[jax.Array, Any]]:
        (value, aux), grads = differentiate(selected, *merge(part, whole))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (value, aux)

    total, (values, aux) = jax.lax.scan(step, total, split, length=parts)
    grads = jax.tree.map(lambda t, x: (t / parts).astype(jnp.result_type(x)), total, selected)
    return values.mean(), aux, grads


def _microbatches(args: tuple, kwargs: dict, parts: int) -> tuple[PyTree, PyTree]:
    """What differs from part to part, stacked along a new first axis, and what does not."""
    flat = flatten((args, kwargs))
    leaves, differs = list(flat.leaves), []
    rows, source = None, ""
    for i, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
        where, _, name = path.partition("/")
        if key := (is_key(leaf) and leaf.ndim == 0):
            leaves[i] = jax.random.split(leaf, parts)
        batched = where == "0" and is_array(leaf) and jnp.ndim(leaf) > 0
        differs.append(key or batched)
        if not batched:
            continue
        n = leaf.shape[0]
        rows, source = (n, name) if rows is None else (rows, source)
        if n != rows:
            raise GradientError(
                f"microbatches: argument '{name}' has {n} rows and '{source}' has {rows}; arrays "
                "in positional arguments are split along their first axis. Pass what belongs to "
                "every part whole by keyword."
            )
        if n % parts:
            raise GradientError(
                f"microbatches={parts} does not divide the {n} rows of argument '{name}'."
            )
        leaves[i] = leaf.reshape(parts, n // parts, *leaf.shape[1:])
    whole = [
        path.partition("/")[2]
        for path, leaf, differ in zip(flat.paths, flat.leaves, differs, strict=True)
        if is_array(leaf) and jnp.ndim(leaf) > 0 and not differ
    ]
    if rows is None and (whole or not any(differs)):
        raise GradientError(
            f"microbatches={parts} and no positional argument to split"
            + (f": {listed(map(repr, whole))} would go to each part whole" if whole else "")
            + ". Pass the batch by position: loss_and_grad(params, batch)."
        )
    return halves(dataclasses.replace(flat, leaves=leaves), differs)


def _wide(dtype: Any) -> Any:
    return jnp.float32 if dtype.itemsize < 4 else dtype
