"""How many floating point operations an equation takes, from its shapes alone.

Matrix products and convolutions are counted exactly, what moves or relabels data as nothing,
everything else as one operation per element. XLA's own count needs a compiled program; the
crossing is chosen before anything is compiled, and only needs the large terms right.
"""

import math
from collections.abc import Iterable

from jax.extend import core as jex

_FREE = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims slice copy stop_gradient name iota "
    "concatenate pad split rev convert_element_type bitcast_convert_type device_put copy_p "
    "sharding_constraint optimization_barrier random_wrap random_unwrap".split()
)


def flops(eqn: jex.JaxprEqn) -> int:
    """Floating point operations of one equation, its bodies included.

    A `while` is counted as one turn, and a `cond` as its dearest branch.
    """
    name = eqn.primitive.name
    if name in _FREE:
        return 0
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        lhs = eqn.invars[0].aval.shape
        return 2 * _size(eqn.outvars) * math.prod(lhs[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        features_out = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(eqn.outvars) * math.prod(kernel) // features_out
    if name == "cond":
        return max(total(branch.jaxpr.eqns) for branch in eqn.params["branches"])
    if bodies := list(jex.jaxprs_in_params(eqn.params)):
        once = sum(total(body.eqns) for body in bodies)
        if name == "reduce" or name.startswith("scatter"):
            return _size(eqn.invars)
        return once * (eqn.params["length"] if name == "scan" else 1)
    if name.startswith(("reduce", "arg", "cum", "sort", "top_k")):
        return _size(eqn.invars)
    return _size(eqn.outvars)


def total(eqns: Iterable[jex.JaxprEqn]) -> int:
    """Floating point operations of several equations."""
    return sum(map(flops, eqns))


def nbytes(aval) -> int:
    """What a value of this shape and dtype takes in memory."""
    return math.prod(aval.shape) * aval.dtype.itemsize


def _size(atoms) -> int:
    return sum(math.prod(getattr(a.aval, "shape", ())) for a in atoms)
