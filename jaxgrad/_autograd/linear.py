"""Units through equations, and what is linear in a sum over the examples.

What is linear in a sum is a sum: of the gradients too. What is not (the root of a mean, a batch
normalised by its mean) gives each example a part in the gradient of the others.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxgrad._autograd.places import NONE, Count, Place, Rows, Shared, Sums, Unit
from jaxgrad._staging.batch_axis import Dim, Mixes, Step

_WORDS = """
add add_any broadcast_in_dim concatenate conj convert_element_type copy cumsum device_put
dynamic_slice dynamic_update_slice gather imag jaxgrad_tap name neg optimization_barrier pad real
reduce_precision reduce_sum reshape rev scatter scatter-add select_n sharding_constraint slice split
squeeze stack stop_gradient sub tile transpose unstack
"""
_LINEAR = frozenset(_WORDS.split())
# Twice the input gives twice the output, if the factor is positive as a number of rows is.
_HOMOGENEOUS = frozenset(
    ["abs", "cummax", "cummin", "max", "min", "reduce_max", "reduce_min", "reduce_window_max"]
)
_COMPARE = frozenset(["eq", "ge", "gt", "le", "lt", "ne"])
_PRODUCTS = frozenset(["mul", "dot_general", "conv_general_dilated"])
# What keeps a divisor from being zero.
_GUARDS = _COMPARE | {
    *("add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "max", "min"),
    *("mul", "not", "or", "reshape", "select_n", "squeeze", "stop_gradient", "sub"),
}

# The operands that say where or which, and not what.
_CHOOSES = {
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "gather": slice(1, None),
    "scatter": slice(1, 2),
    "scatter-add": slice(1, 2),
    "select_n": slice(0, 1),
}


def zero(name: str, places: Sequence[Place]) -> bool:
    """Whether an output is zero because its input is."""
    stays = name in _LINEAR and len(places) == 1
    return stays and isinstance(places[0], Shared | Rows) and places[0].zero


def unit(name: str, step: Step, places: Sequence[Place]) -> Unit:
    """The unit of an output, of inputs that are not sums.

    Raises:
        Mixes: an input has a unit, and the equation is not homogeneous in it.
    """
    known = [p for p in places if isinstance(p, Shared | Rows)]
    units = [p.unit for p in known]
    if all(u == NONE for u in units):
        return NONE
    if name in _PRODUCTS:
        return _product(units)
    if name == "div":
        return units[0] * units[1] ** -1
    if name in ("integer_pow", "square"):
        return units[0] ** step.params.get("y", 2)
    chosen, values = _operands(name, known)
    found = {p.unit for p in values if not p.zero}
    if all(p.unit == NONE for p in chosen) and len(found) == 1:
        (one,) = found
        if name in _COMPARE and any(p.zero for p in values):
            return NONE
        if (name in _LINEAR and _stays_real(name, step)) or (
            name in _HOMOGENEOUS and not one.counts
        ):
            return one
    if any(u.counts for u in units):
        raise Mixes("is applied to examples that are divided by a sum over the batch")
    raise Mixes("depends on the size of the batch")


def of_sums(
    name: str, step: Step, places: Sequence[Place], free: Sequence[bool], source: str
) -> Place:
    """The place of the output of an equation that reads a sum over the examples.

    Args:
        name: the primitive.
        step: the equation.
        places: of its inputs.
        free: for each input, whether it does not depend on what is differentiated.
        source: where the equation is.

    Raises:
        Mixes: it is not linear in the sum.
    """
    taken = next(p for p in places if isinstance(p, Sums | Count))
    if name == "div":
        return _quotient(places[0], places[1], free[1])
    if any(not isinstance(p, Shared | Sums | Count) for p in places):
        raise Mixes(f"combines each example with a sum over all of them ({taken.source})")
    chosen, values = _operands(name, places)
    sums = [p for p in values if isinstance(p, Sums)]
    if name == "select_n" and sums and _is_guarded(places[0], values):
        return sums[0]
    if not any(isinstance(p, Count) for p in places) and all(isinstance(p, Shared) for p in chosen):
        if name in _PRODUCTS and len(sums) == 1:
            return dataclasses.replace(sums[0], unit=_product([p.unit for p in values]))
        if name in _LINEAR and _stays_real(name, step):
            return _sum(name, step, values)
    if name in _GUARDS and all(free):
        return Count(taken.unit, source)
    raise Mixes(f"is applied to a sum over the examples ({taken.source}), and is not linear in it")


def compatible(shared: Shared, total: Unit) -> bool:
    """Whether a constant added to a sum leaves it a sum: c is the mean over the examples of c."""
    return shared.zero or total in (shared.unit * Unit(rows=-1), shared.unit * Unit(counts=-1))


def _sum(name: str, step: Step, values: Sequence[Place]) -> Sums:
    sums = [p for p in values if isinstance(p, Sums)]
    shared = [p for p in values if isinstance(p, Shared)]
    first = max(sums, key=lambda p: bool(p.unit.counts))
    even = all(p.even and p.unit == first.unit for p in sums)
    even &= all(compatible(p, first.unit) for p in shared)
    made = dataclasses.replace(first, even=even)
    if not made.unit.counts and (over_count := [p.unit for p in shared if p.unit.counts]):
        made = dataclasses.replace(made, unit=over_count[0])
    if name == "reduce_sum":  # of a sum that was repeated for each row
        over = sum(isinstance(step.ins[0][d], Dim) for d in step.params["axes"])
        made = dataclasses.replace(made, unit=made.unit * Unit(rows=over))
    return made


def _quotient(a: Place, b: Place, free: bool) -> Place:
    if isinstance(a, Shared | Rows | Sums) and isinstance(b, Shared):
        return dataclasses.replace(a, unit=a.unit * b.unit**-1)
    if not isinstance(b, Sums | Count):
        raise Mixes("combines each example with a sum over all of them")
    if not free:
        raise Mixes(f"divides by a sum over the examples ({b.source}) that has a gradient itself")
    if not isinstance(a, Shared | Rows | Sums) or b.unit.counts:
        raise Mixes(f"divides by a sum over the examples ({b.source})")
    return dataclasses.replace(a, unit=a.unit * b.unit**-1 * Unit(counts=-1))


def _operands(name: str, places: Sequence) -> tuple[list, list]:
    """The operands that choose, and those whose values go into the output."""
    which = _CHOOSES.get(name, slice(0, 0))
    chosen = range(len(places))[which]
    return (
        [places[i] for i in chosen],
        [p for i, p in enumerate(places) if i not in chosen],
    )


def _is_guarded(chosen: Place, values: Sequence[Place]) -> bool:
    """Whether this chooses between a weighted mean and zero: where(count > 0, total / count, 0)."""
    return isinstance(chosen, Count) and all(
        p.zero if isinstance(p, Shared) else isinstance(p, Sums) and bool(p.unit.counts)
        for p in values
    )


def _product(units: Sequence[Unit]) -> Unit:
    made = NONE
    for u in units:
        made *= u
    return made


def _stays_real(name: str, step: Step) -> bool:
    """Whether an equation does not round to integers."""
    return name != "convert_element_type" or jnp.issubdtype(step.params["new_dtype"], jnp.inexact)
