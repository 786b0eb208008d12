"""What a function costs as it runs: operations, bytes and memory of its compiled programs.

XLA drops what nothing reads, but only within one program. So a function is measured
as written: each `jax.jit` that it calls is compiled as a program of its own and asked for its cost,
and the operations between them are counted one by one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from jaxgrad._jaxpr.flops import flops, nbytes
from jaxgrad._jaxpr.views import Call, view
from jaxgrad._tree.flat import PyTree


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one call costs.

    Attributes:
        flops: floating point operations, as XLA counts them.
        nbytes: bytes that its programs read and write.
        peak: bytes of the largest program's arguments, results and temporaries together.
    """

    flops: float
    nbytes: float
    peak: int


def measured(fun: Callable[..., Any], *args: PyTree) -> tuple[Callable[..., Any], Cost]:
    """Returns `fun`, compiled for arguments like these if it is jitted, and what a call costs.

    Args:
        fun: a jitted function, compiled once for both results; or a plain one, which runs op by op
            except for the jitted functions that it calls.
        *args: what it is called with.
    """
    if isinstance(fun, jax.stages.Wrapped):
        compiled = fun.lower(*args).compile()
        return compiled, _compiled(compiled)
    parts = [_of(eqn) for eqn in jax.make_jaxpr(fun)(*args).jaxpr.eqns]
    return fun, Cost(
        sum(p.flops for p in parts),
        sum(p.nbytes for p in parts),
        max((p.peak for p in parts), default=0),
    )


def _of(eqn: jex.JaxprEqn) -> Cost:
    call = view(eqn)
    if type(call) is not Call:
        moved = sum(map(nbytes, [*eqn.invars, *eqn.outvars]))
        return Cost(flops(eqn), moved, moved)
    specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]  # pyright: ignore[reportAttributeAccessIssue]
    return _compiled(jax.jit(jex.jaxpr_as_fun(call.body)).lower(*specs).compile())


def _compiled(program: jax.stages.Compiled) -> Cost:
    counts, memory = program.cost_analysis() or {}, program.memory_analysis()
    peak = 0
    if memory is not None:  # not every backend reports it
        parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes)
        peak = sum(parts) + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return Cost(counts.get("flops", 0.0), counts.get("bytes accessed", 0.0), peak)
