"""Mixed precision: a loss computed in half precision, from parameters kept in full precision.

The cast is part of the loss, so its gradient is cast back: the optimizer sees the full-precision
master copies, and only trained parameters need one. The cast of a frozen parameter is a constant,
which staging computes once.

Loss scaling is part of the loss too. The value is not touched: where it leaves half precision, its
cotangent is multiplied, and where the arguments enter, theirs are divided again. Whatever takes the
gradient, an optimizer or a clip by its norm, sees the gradient of the loss and not the scale.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._text import listed
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, variables
from jaxgrad._tree.pattern import is_within
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.wrt import Wrt, match

X = ParamSpec("X")
V = TypeVar("V")


def mixed_precision(
    loss: Callable[X, V],
    dtype: str = "bfloat16",
    *,
    loss_scale: float | None = None,
    exclude: Wrt | None = None,
) -> Callable[X, V]:
    """Returns a loss that computes in another floating-point dtype.

    Args:
        loss: `loss(params, *args, **kwargs)`. It casts by itself what should be computed in full
            precision, such as a softmax over many classes: `logits.astype(jnp.float32)`.
        dtype: of the computation: `bfloat16`, or `float16`, whose small gradients vanish unless the
            loss is scaled.
        loss_scale: multiply the cotangents inside the loss by this number, `2**15` say, so that
            small ones survive in `float16`. Value and gradients come out unscaled: gradients are
            divided in the dtype of the parameters. A gradient that overflows is infinite; see
            `max_nonfinite_steps` of `fit`. Cotangents seen inside (`tap`, `hook`) are scaled. So is
            the gradient of what `loss` closes over, which is not an argument.
        exclude: what is not cast, positions or targets: a `wrt` (see `select`) over the arguments,
            by the names that `loss` gives them: `"batch/y"`, `["batch/positions", "params/norm"]`.

    Returns:
        A function of the same arguments. Floating-point arrays among the parameters and the
        arguments are cast before the call, and those that it returns are cast back to `float32`.
        Gradients have the dtypes of the parameters that are passed. Running statistics stay as they
        are: an argument `stats`, a collection `batch_stats`, the `BatchStat`s of an NNX module.
        With a `loss_scale`, JAX refuses forward-mode differentiation, as of every `custom_vjp`;
        forward over reverse (`jax.hessian`) works.

    Raises:
        ValueError: `dtype` is not a floating-point dtype; `loss_scale` is not a positive number, or
            the loss returns `dtype` and it can't hold the scale.
        SelectionError: on a call, `exclude` matches no array.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> loss = jg.mixed_precision(lambda w, x: jnp.mean(x @ w))
        >>> value, grad = jg.value_and_grad(loss)(jnp.ones((3, 2)), jnp.full((4, 3), 0.1))
        >>> print(value, value.dtype, grad.dtype)
        0.30078125 float32 float32

    Source: Micikevicius et al., "Mixed precision training" (2018); `torch.autocast`, which chooses
    the dtype for each operation, and `torch.amp.GradScaler`.
    """
    half = jnp.dtype(dtype)
    if not jnp.issubdtype(half, jnp.floating):
        raise ValueError(f"dtype={dtype!r}; it must be a floating-point dtype, such as 'bfloat16'.")
    scale = None if loss_scale is None else _checked(loss_scale)
    run: Callable[..., V] = loss
    parameters = _parameters(loss)

    @functools.wraps(loss)
    def wrapped(*args: X.args, **kwargs: X.kwargs) -> V:
        names = _names(parameters, len(args))
        given = dict(zip(names, args, strict=True)) | kwargs
        flat = flatten(given)
        kept = _kept(flat, given, exclude)
        leaves = [
            _enter(x, None if keep else half, scale)
            for x, keep in zip(flat.leaves, kept, strict=True)
        ]
        cast = flat.treedef.unflatten(leaves)
        out = run(*(cast[name] for name in names), **{name: cast[name] for name in kwargs})
        _check_range(out, scale)
        return jax.tree.map(lambda x: _leave(x, half, scale), out)

    return wrapped


def _checked(loss_scale: float) -> float:
    number = isinstance(loss_scale, numbers.Real) and not isinstance(loss_scale, bool)
    if not number or not 0 < loss_scale < math.inf:
        raise ValueError(
            f"loss_scale={loss_scale!r}; it must be a positive number, as 2**15, or None."
        )
    return float(loss_scale)


# Where values enter half precision and leave it.


def _enter(x: Any, half: Any, scale: float | None) -> Any:
    """An argument in the dtype of the computation, or in its own; its gradient unscaled."""
    if not _is_inexact(x):
        return x
    to = half if half is not None and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    return x.astype(to) if scale is None else _crossing(x, to, x.dtype, 1 / scale)


def _leave(x: Any, half: Any, scale: float | None) -> Any:
    """A result in `float32` if it is in half precision; its cotangent scaled."""
    if not _is_inexact(x):
        return x
    to = jnp.dtype(jnp.float32) if x.dtype == half else x.dtype
    return x.astype(to) if scale is None else _crossing(x, to, x.dtype, scale)


def _check_range(out: Any, scale: float | None) -> None:
    """Raises if the value, the first leaf of the result, can't have `scale` as its cotangent."""
    for value in filter(_is_inexact, jax.tree.leaves(out)[:1]):
        most = float(jnp.finfo(value.dtype).max)
        if scale is not None and scale > most:
            raise ValueError(
                f"loss_scale={scale:g} is more than {most:g}, the most that {value.dtype}, the "
                "dtype of what the loss returns, can hold. Pass a smaller one, 2**15 say, or "
                "return the loss in float32."
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _crossing(x: jax.Array, to: Any, of: Any, factor: float) -> jax.Array:
    """`x`, of dtype `of`, in dtype `to`; the cotangent is multiplied by the factor on its way."""
    return jnp.asarray(x, to)


def _forward(x: jax.Array, to: Any, of: Any, factor: float) -> tuple[jax.Array, None]:
    return jnp.asarray(x, to), None


def _backward(to: Any, of: Any, factor: float, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    wide = np.promote_types(np.promote_types(to, np.float32), np.promote_types(of, np.float32))
    return ((cotangent.astype(wide) * factor).astype(of),)


_crossing.defvjp(_forward, _backward)


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


# Which arguments stay as they are.


def _kept(flat: Flat, given: PyTree, exclude: Wrt | None) -> list[bool]:
    """Which leaves of the named arguments are not cast."""
    statistics = [name for name, _ in variables(given, "BatchStat")]
    kept = [
        is_within(path, "stats")
        or "batch_stats" in path.split("/")
        or any(is_within(path, name) for name in statistics)
        for path in flat.paths
    ]
    if exclude is None:
        return kept
    try:
        excluded = match(flat, exclude)
    except SelectionError as e:
        raise SelectionError(str(e).replace("wrt", "exclude", 1)) from None
    if not any(e and is_array(x) for e, x in zip(excluded, flat.leaves, strict=True)):
        named = listed(repr(p) for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x))
        raise SelectionError(f"exclude={exclude!r} takes no array of the arguments: {named}.")
    return [k or e for k, e in zip(kept, excluded, strict=True)]


def _parameters(loss: Callable[..., Any]) -> Sequence[inspect.Parameter]:
    try:
        return tuple(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return ()


def _names(parameters: Sequence[inspect.Parameter], count: int) -> list[str]:
    """The names of so many positional arguments; beyond those that have one, by their number."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional][:count]
    rest = [f"{p.name}/" for p in parameters if p.kind == inspect.Parameter.VAR_POSITIONAL] or [""]
    return [*names, *(f"{rest[0]}{i}" for i in range(count - len(names)))]
