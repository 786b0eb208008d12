"""The floating point operations of an equation, counted from its shapes alone.

Matrix products and convolutions count exactly, equations that move or relabel data count as zero,
and all others as one operation per element. XLA's own count needs a compiled program; staging
chooses its crossing before anything is compiled, and only needs the large terms right.
"""

import math
from collections.abc import Iterable

from jax.extend import core as jex

from jaxgrad._jaxpr.source import Atom, aval, dtype, shape
from jaxgrad._jaxpr.views import Cond, Scan, ShardMap, bodies, view

_FREE = """
bitcast_convert_type broadcast_in_dim concatenate convert_element_type copy copy_p device_put
expand_dims iota jaxgrad_tap name optimization_barrier pad random_unwrap random_wrap reshape rev
sharding_constraint slice split squeeze stop_gradient transpose
"""


def flops(eqn: jex.JaxprEqn) -> int:
    """Floating point operations of one equation, its bodies included.

    A `while` counts as one iteration, and a `cond` as its most expensive branch.
    """
    name = eqn.primitive.name
    if name in _FREE.split():
        return 0
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        lhs = aval(eqn.invars[0]).shape
        return 2 * _size(eqn.outvars) * math.prod(lhs[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = aval(eqn.invars[1]).shape
        features_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(eqn.outvars) * math.prod(kernel) // features_out
    if inside := [total(body.jaxpr.eqns) for body in bodies(eqn)]:
        if name == "reduce" or name.startswith("scatter"):
            return _size(eqn.invars)
        match view(eqn):
            case Cond():
                return max(inside)
            case Scan(length=length):
                return inside[0] * length
            case ShardMap(mesh=mesh, over=over):  # on each device
                return inside[0] * math.prod(mesh[axis] for axis in over)
        return sum(inside)
    if name.startswith(("reduce", "arg", "cum", "sort", "top_k")):
        return _size(eqn.invars)
    return _size(eqn.outvars)


def total(eqns: Iterable[jex.JaxprEqn]) -> int:
    """Floating point operations of several equations."""
    return sum(map(flops, eqns))


def nbytes(atom: Atom) -> int:
    """The size of a value in bytes."""
    kind = dtype(atom)
    return math.prod(shape(atom)) * kind.itemsize if kind is not None else 0


def _size(atoms: Iterable[Atom]) -> int:
    return sum(math.prod(shape(atom)) for atom in atoms)
