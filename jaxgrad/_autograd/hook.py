"""A function applied to a cotangent on its way back.

This is `jax.custom_vjp` of the identity, plus three things that it leaves to its user. The values
that the function closes over become arguments, so that a hook in the body of a scan may use the
body's values. The result is checked where the hook is written, not where the cotangent arrives.
Leaves without gradients are hidden from the function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util

from jaxgrad._autograd.tap import floats
from jaxgrad._jaxpr.views import opened
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import flatten

T = TypeVar("T")

source_info_util.register_exclusion(__file__)  # the line of a hook is the user's


class HookError(ValueError):
    """A hook whose result is not a cotangent of its value: the message says how it differs."""

    __module__ = "jaxgrad"


def hook(x: T, fn: Callable[[T], T | None]) -> T:
    """Returns `x`, whose cotangent passes through `fn` on its way back.

    Args:
        x: an array, or a pytree of arrays.
        fn: takes the cotangent of `x` (of its structure, shapes and dtypes, with `None` for
            leaves that are not floats) and returns the one to pass on, or `None` to only look at
            it and pass it on unchanged. JAX traces it like any function: to look at values use
            `jax.debug.print` or `jax.debug.callback`. Under `vmap`, `fn` sees one example.

    Returns:
        `x`; the forward pass computes nothing for it.

    Raises:
        HookError: `fn` returns another structure, shape or dtype than its argument's.

    JAX refuses forward-mode differentiation through a hook, as through every `custom_vjp`;
    forward over reverse (`jax.hessian`) and reverse over reverse work, and differentiate `fn`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(x):
        ...     h = jg.hook(x**2, lambda g: jnp.clip(g, -1, 1))
        ...     return jnp.sum(10 * h)
        >>> print(jax.grad(loss)(jnp.array([1.0, 2.0])))
        [2. 4.]

    Source: `Tensor.register_hook`.
    """
    leaves, tree, rebuild = floats(x)
    if not leaves:
        return x

    def on_leaves(*cotangents: jax.Array) -> Sequence[jax.Array]:
        given = tree.unflatten(cotangents)
        returned = fn(given)
        if returned is None:
            return cotangents
        _check(given, returned)
        return jax.tree.leaves(returned)

    # What `fn` closes over becomes an argument: it may be a tracer (of a scan's body, say) that
    # no longer exists when the cotangents arrive.
    jaxpr, closed_over = opened(jax.make_jaxpr(on_leaves)(*leaves))
    return rebuild(_hooked(jaxpr, closed_over, leaves))


def _check(given: Any, returned: Any) -> None:
    before, after = flatten(given), flatten(returned)
    if before.treedef != after.treedef:
        raise HookError(
            f"the hook receives a cotangent of structure {before.treedef} but returns "
            f"{after.treedef}. Return the same structure, or None to pass the cotangent on."
        )
    wrong = [
        f"{f'{path!r}: ' if path else ''}{spec(a)} for a cotangent of {spec(b)}"
        for path, a, b in zip(before.paths, after.leaves, before.leaves, strict=True)
        if b is not None and (jnp.shape(a), jnp.result_type(a)) != (b.shape, b.dtype)
    ]
    if wrong:
        raise HookError(
            f"the hook returns {listed(wrong)}; a cotangent keeps its shape and dtype. "
            "Use jnp.broadcast_to or .astype(g.dtype)."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hooked(jaxpr: jex.Jaxpr, consts: Sequence[Any], leaves: Sequence[Any]) -> Sequence[Any]:
    return leaves


def _forward(jaxpr: jex.Jaxpr, consts: Sequence[Any], leaves: Sequence[Any]) -> tuple[Any, Any]:
    return leaves, consts


def _backward(jaxpr: jex.Jaxpr, consts: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))
    return None, list(run(*consts, *cotangents))


_hooked.defvjp(_forward, _backward)
