"""Runs a jaxpr equation by equation; the caller decides how each one runs.

JAX evaluates a jaxpr in one call. To change one equation of a function (a tap) or to look at the
values in between (the search for a NaN), run the trace here instead, and bind all other equations
as they were written, in their scopes and with their source lines.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex
from jax.extend import source_info_util

from jaxgrad._jaxpr.source import Atom

Values = Sequence[Any]


def interpret(
    program: jex.ClosedJaxpr,
    args: Values,
    equation: Callable[[jex.JaxprEqn, Values], Values],
) -> list[Any]:
    """Runs a program, each equation by `equation(eqn, values)`, and returns its outputs."""
    jaxpr = program.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))
    last = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if isinstance(v, jex.Var)}
    kept = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        outs = equation(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
        # Drop each value after its last use, to take no more memory than the function itself.
        for v in {v for v in eqn.invars if isinstance(v, jex.Var)} - kept:
            if last[v] == i:
                del env[v]
    return [read(v) for v in jaxpr.outvars]


def bind(eqn: jex.JaxprEqn, values: Values) -> Values:
    """Runs one equation as it was written."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    params = eqn.primitive.get_bind_params(eqn.params)
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **params)
    return out if eqn.primitive.multiple_results else [out]
