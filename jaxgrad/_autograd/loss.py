"""Checks on a loss: the leaves to differentiate, what it writes, and that it is a scalar.

`value_and_grad`, `fit` and the rest call user functions through here, so that one mistake has one
error text everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import PyTree, is_hole, is_value, variables
from jaxgrad._tree.nnx import nnx_types
from jaxgrad._tree.pattern import is_within
from jaxgrad._tree.select import select
from jaxgrad._tree.selection import Selection, SelectionError
from jaxgrad._tree.wrt import Wrt


class GradientError(ValueError):
    """A loss, cotangent or batch that can't be differentiated as asked: the message says why."""

    __module__ = "jaxgrad"


def checked(fun: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`fun`, with the checks of `value_and_grad` on a loss made when it is called or traced."""

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        return scalar_value(call_loss(fun, params, args, kwargs))

    return wrapped


def differentiable(params: PyTree, wrt: Wrt) -> Selection:
    """`select`, or an error if a selected leaf can't have a gradient."""
    selection = select(params, wrt)
    flat = selection.flat
    for path, leaf, flag in zip(flat.paths, flat.leaves, selection.flags, strict=True):
        if flag and not is_hole(leaf) and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise SelectionError(
                f"wrt selects '{path}', which is {spec(leaf)} and has no gradient: "
                f"only floating-point leaves do. Exclude it: wrt=[..., '!{path}']."
            )
    for name, node in variables(params, "BatchStat"):
        held = (is_within(path, name) for path in selection.paths)
        if jax.tree.leaves(node) and any(held):
            raise SelectionError(
                f"wrt selects '{name}', a running statistic ({type(node).__name__}), which no "
                f"optimizer should update. Exclude it: wrt=[..., '!{name}']; or separate "
                "parameters from statistics with `jaxgrad.functional(model)`."
            )
    return selection


def call_loss(
    fun: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict, what: str = "the loss"
) -> Any:
    """Calls `fun`; raises if it writes into an NNX module among the parameters.

    A module rebuilt from its leaves is a copy: new running statistics and random counts would
    be lost with it, and neither Flax nor JAX says so. The error calls `fun` by `what`.
    """
    before = _writable(params)
    out = fun(params, *args, **kwargs)
    if before:
        after = _writable(params)
        changed = [f"'{path}'" for path, x in before.items() if after.get(path, x) is not x]
        if changed:
            raise GradientError(
                f"{what} changes {listed(changed)} of the NNX module it is passed. The change is "
                "lost, because the module is a copy. Use `apply, params = "
                "jaxgrad.functional(model)`: `apply` is in inference mode, `apply.train` returns "
                "the new statistics and draws from a key that you pass."
            )
    return out


def _writable(tree: PyTree) -> dict[str, Any]:
    """What an NNX module may write when it is called, by path: all but its parameters.

    Parameters are left out because `nnx.remat` and `nnx.jit` write back what they were passed.
    """
    (param,) = nnx_types("Param") or (None,)
    return {
        name: leaf
        for name, node in variables(tree)
        if param is None or not isinstance(node, param)
        for leaf in jax.tree.leaves(node)
    }


def scalar_value(value: Any) -> jax.Array:
    if not is_value(value):
        raise GradientError(
            f"the loss returns {type(value).__name__}, not a scalar. If it returns "
            "(value, aux), pass has_aux=True."
        )
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise GradientError(
            f"the loss returns {spec(value)}; a gradient needs a real scalar. "
            "Reduce it (jnp.mean), or pass a cotangent: jaxgrad.backward(..., gradient=...)."
        )
    return value
