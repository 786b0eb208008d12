"""Compares traces of one function at two batch sizes.

Differences between the traces show where the batch size enters: a size that scales with it becomes
a `Dim`; a literal or parameter that differs means that the computation uses the batch size itself.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jax.extend import core as jex
from jax.typing import ArrayLike

from jaxgrad._jaxpr.source import dtype, shape, whence
from jaxgrad._staging.batch_axis import Dim, Mixes, Shape
from jaxgrad._tree.bitwise import change, host

Sizes: TypeAlias = tuple[int, int]


class Misaligned(Exception):  # noqa: N818
    """Two traces of one function have different equations; the message says where."""


def align(first: jex.Jaxpr, second: jex.Jaxpr) -> dict[jex.Var, jex.Var]:
    """Pairs the values of two traces of one function.

    Raises:
        Misaligned: the traces differ in more than sizes, literals and parameters.
    """
    pairs: dict[jex.Var, jex.Var] = {}

    def pair(ones, others, eqn):
        same = len(ones) == len(others)
        for a, b in zip(ones, others, strict=False):
            if isinstance(a, jex.Literal) or isinstance(b, jex.Literal):
                same &= isinstance(a, jex.Literal) and isinstance(b, jex.Literal)
            elif dtype(a) != dtype(b) or len(shape(a)) != len(shape(b)):
                same = False
            else:
                same &= pairs.setdefault(a, b) is b
        if not same:
            where = f"at {whence(eqn)[0]}" if eqn is not None else "in its inputs or outputs"
            raise Misaligned(f"it computes something else {where}")

    pair([*first.constvars, *first.invars], [*second.constvars, *second.invars], None)
    for a, b in zip(first.eqns, second.eqns, strict=False):
        if a.primitive is not b.primitive:
            raise Misaligned(f"it computes something else at {whence(a)[0]}")
        pair(a.invars, b.invars, a)
        pair(a.outvars, b.outvars, a)
    if len(first.eqns) != len(second.eqns):
        raise Misaligned("it has more equations at one size than at the other")
    pair(first.outvars, second.outvars, None)
    return pairs


def uses_batch_size(first: jex.JaxprEqn, second: jex.JaxprEqn, sizes: Sizes) -> bool:
    """Whether the batch size enters an equation other than through the shapes."""
    literals = (
        (a.val, b.val)
        for a, b in zip(first.invars, second.invars, strict=True)
        if isinstance(a, jex.Literal) and isinstance(b, jex.Literal)
    )
    if any(not np.array_equal(a, b, equal_nan=_inexact(a)) for a, b in literals):
        return True
    return parameters_differ(first, second, sizes)


def parameters_differ(first: jex.JaxprEqn, second: jex.JaxprEqn, sizes: Sizes) -> bool:
    """Whether the parameters of two equations differ in more than shapes."""
    if first.primitive.name in _DERIVATIVES:
        return False
    shapes = SIZES.get(first.primitive.name, ())
    for name, value in first.params.items():
        other = second.params.get(name)
        if _is_body(value) or callable(value) or value is other:
            continue
        if name in shapes:
            unify(value, second.params[name], sizes)
        elif not _same(value, other):
            return True
    return False


def unify(first: Sequence[int], second: Sequence[int], sizes: Sizes) -> Shape:
    """Merges the sizes of two traces: those that scale with the batch become a `Dim`."""
    if len(first) != len(second):
        raise Mixes("changes its number of axes with the batch size")
    made: list[int | Dim] = []
    for a, b in zip(first, second, strict=True):
        if a == b:
            made.append(a)
        elif a % sizes[0] == 0 and b % sizes[1] == 0 and a // sizes[0] == b // sizes[1]:
            made.append(Dim(a // sizes[0]))
        else:
            raise Mixes("has a size that is not a multiple of the batch size")
    return tuple(made)


# Parameters that are sizes, which may contain the batch size.
SIZES = {
    "broadcast_in_dim": ("shape",),
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes",),
    "iota": ("shape",),
    "random_bits": ("shape",),
    "random_split": ("shape",),
    "reshape": ("new_sizes",),
    "rng_bit_generator": ("shape",),
    "slice": ("limit_indices",),
}


# Apart from their body, these have only the functions that make their derivatives.
_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call")


def _same(a: object, b: object) -> bool:
    return bool(np.all(a == b)) or (a != a and b != b)  # a fill value may be NaN


def equal(a: ArrayLike, b: ArrayLike) -> bool:
    """Whether two arrays that traces close over agree bit for bit, keys and NaNs included."""
    if a is b:
        return True
    a, b = host(a), host(b)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and change(a, b) is None


def _is_body(value: object) -> bool:
    bodies = value if isinstance(value, tuple | list) and value else (value,)
    return all(isinstance(v, jex.Jaxpr | jex.ClosedJaxpr) for v in bodies)


def _inexact(value: ArrayLike) -> bool:
    return np.issubdtype(np.asarray(value).dtype, np.inexact)
