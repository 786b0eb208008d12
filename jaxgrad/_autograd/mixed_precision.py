"""Mixed precision: a loss computed in half precision, from parameters kept in full precision.

The cast is part of the loss, so its gradient is cast back: the optimizer sees the full-precision
master copies, and only trained parameters need one. The cast of a frozen parameter is a constant,
which staging computes once.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

X = ParamSpec("X")
V = TypeVar("V")


def mixed_precision(loss: Callable[X, V], dtype: str = "bfloat16") -> Callable[X, V]:
    """Returns a loss that computes in another floating-point dtype.

    Args:
        loss: `loss(params, *args, **kwargs)`. It casts by itself what should be computed in full
            precision, such as a softmax over many classes: `logits.astype(jnp.float32)`.
        dtype: of the computation: `bfloat16`, or `float16`, whose small gradients vanish unless the
            loss is scaled.

    Returns:
        A function of the same arguments. Floating-point arrays among the parameters and the
        arguments are cast before the call, and those that it returns are cast back to `float32`.
        Gradients have the dtypes of the parameters that are passed.

    Raises:
        ValueError: `dtype` is not a floating-point dtype.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> loss = jg.mixed_precision(lambda w, x: jnp.mean(x @ w))
        >>> value, grad = jg.value_and_grad(loss)(jnp.ones((3, 2)), jnp.full((4, 3), 0.1))
        >>> print(value, value.dtype, grad.dtype)
        0.30078125 float32 float32

    Source: Micikevicius et al., "Mixed precision training" (2018); `torch.autocast`, which chooses
    the dtype for each operation.
    """
    half = jnp.dtype(dtype)
    if not jnp.issubdtype(half, jnp.floating):
        raise ValueError(f"dtype={dtype!r}; it must be a floating-point dtype, such as 'bfloat16'.")

    @functools.wraps(loss)
    def wrapped(*args: X.args, **kwargs: X.kwargs) -> V:
        args, kwargs = jax.tree.map(lambda x: _cast(x, half), (args, kwargs))
        out = loss(*args, **kwargs)
        return jax.tree.map(lambda x: _cast(x, jnp.dtype(jnp.float32), of=half), out)

    return wrapped


def _cast(x: Any, dtype: Any, of: Any = None) -> Any:
    """A floating-point array (of that dtype, if one is given) in another dtype."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(dtype) if of is None or x.dtype == of else x
