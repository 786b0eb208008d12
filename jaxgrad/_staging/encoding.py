"""Stores features in fewer bits, and measures the error."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

ENCODINGS = (None, "bfloat16", "int8")


def is_encoded(dtype: np.dtype, encoding: str | None) -> bool:
    """Whether values of this dtype are stored in another dtype."""
    return encoding is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 2


def encode(x: jax.Array, encoding: str | None) -> tuple[jax.Array, ...]:
    """The arrays to store for some rows. "int8" scales each row by its largest magnitude / 127."""
    if not is_encoded(x.dtype, encoding):
        return (x,)
    if encoding == "bfloat16":
        return (x.astype(jnp.bfloat16),)
    others = tuple(range(1, x.ndim))
    largest = jnp.max(jnp.abs(x), axis=others, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, jnp.ones_like(largest)).astype(jnp.float32)
    return jnp.round(x / scale.astype(x.dtype)).astype(jnp.int8), scale


def decode(stored: Iterator[jax.Array], dtype: np.dtype, encoding: str | None) -> jax.Array:
    """Takes the next value from the stored arrays, in the dtype that the step needs."""
    x = next(stored)
    if not is_encoded(dtype, encoding):
        return x
    if encoding == "bfloat16":
        return x.astype(dtype)
    return x.astype(dtype) * next(stored).astype(dtype)


def squares(x: jax.Array, encoding: str | None) -> tuple[jax.Array, jax.Array]:
    """The sums of squares of the encoding error and of the values."""
    y = decode(iter(encode(x, encoding)), x.dtype, encoding)
    change, values = (a.astype(jnp.float32) for a in (y - x, x))
    return jnp.sum(change**2), jnp.sum(values**2)
