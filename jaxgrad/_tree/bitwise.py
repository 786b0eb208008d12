"""Whether two trees are bit-identical, and an assertion of it for tests.

`==` is the wrong test for frozen weights: `-0.0` equals `0.0`, and a NaN does not equal itself. So
bytes are compared; values appear only in the message.
"""

from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxgrad._text import count, listed, spec
from jaxgrad._tree.flat import PyTree, check_same_structure, flatten, is_hole, is_key, is_value
from jaxgrad._tree.wrt import Wrt, match


class LeakError(AssertionError):
    """What should be frozen is not, or what should be trained is not; the message names each."""

    __module__ = "jaxgrad"


class Change(NamedTuple):
    """How an array differs from another of its shape and dtype.

    Attributes:
        numbers: how many of its elements differ in a bit.
        largest: the largest difference; 0 if only bits differ, NaN if a NaN came or went.
    """

    numbers: int
    largest: float

    def __str__(self) -> str:
        if self.largest == 0:
            return "only in its bits (the sign of a zero, or the payload of a NaN)"
        return f"by up to {self.largest:.3g}"


def change(before: ArrayLike, after: ArrayLike) -> Change | None:
    """Returns how two arrays of one shape and dtype differ; None if they are bit-identical."""
    a, b = host(before), host(after)
    bits = [np.atleast_1d(x).view(np.uint8).reshape(x.size, x.itemsize) for x in (a, b)]
    differs = (bits[0] != bits[1]).any(axis=1)
    if not differs.any():
        return None
    old, new = (wide(x).reshape(-1)[differs] for x in (a, b))
    with np.errstate(all="ignore"):
        gaps = np.abs(new - old)
    gaps[(old == new) | (np.isnan(old) & np.isnan(new))] = 0
    return Change(int(differs.sum()), float(gaps.max()))


def assert_frozen(before: PyTree, after: PyTree, wrt: Wrt) -> None:
    """Asserts that all leaves but those that `wrt` trains are the same, bit for bit.

    Args:
        before: the parameters before training, any pytree.
        after: the parameters after it, of the same structure.
        wrt: what was trained; see `select`. The other leaves are compared.

    Raises:
        LeakError: a frozen leaf differs in a bit, shape or dtype, or the structures differ; the
            message names the paths and the largest change. `-0.0` is not `0.0` here, and a NaN
            equals itself unless its payload changes.
        SelectionError: a pattern matches no leaf.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> before = {"head": jnp.ones(2), "trunk": jnp.ones(3)}
        >>> jg.assert_frozen(before, before | {"head": jnp.zeros(2)}, "head")
        >>> jg.assert_frozen(before, before | {"trunk": jnp.full(3, 0.5)}, "head")
        Traceback (most recent call last):
            ...
        jaxgrad.LeakError: 1 frozen leaf changed: 'trunk' by up to 0.5 (3 of 3 elements). ...

    Source: a loop over `named_parameters` with `torch.equal`, which takes `-0.0` for `0.0`.
    """
    old, new = flatten(before), flatten(after)
    try:
        check_same_structure(old, new, "before", "after", ValueError)
    except ValueError as e:
        raise LeakError(str(e)) from None
    changed = []
    for path, a, b, trained in zip(old.paths, old.leaves, new.leaves, match(old, wrt), strict=True):
        if trained or not (is_value(a) or is_value(b)):
            continue
        if is_hole(a) != is_hole(b) or spec(a) != spec(b):
            changed.append(f"'{path}' from {_named(a)} to {_named(b)}")
        elif found := change(a, b):
            of = f"{found.numbers:,} of {host(a).size:,} elements"
            changed.append(f"'{path}' {found} ({of})")
    if changed:
        raise LeakError(
            f"{count(changed, 'frozen leaf', verb=False)} changed: {listed(changed)}. "
            "jaxgrad.audit(loss, params, batch, tx, wrt=...) says why."
        )


def host(x: ArrayLike) -> np.ndarray:
    """A NumPy array of the same bytes; a typed PRNG key as its words."""
    if isinstance(x, jax.Array) and is_key(x):
        x = jax.random.key_data(x)
    return np.ascontiguousarray(np.asarray(x))


def wide(x: ArrayLike) -> np.ndarray:
    """An array in double precision, wide enough for differences and squares of other dtypes."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _named(x: PyTree) -> str:
    return "a hole" if is_hole(x) else spec(x)
