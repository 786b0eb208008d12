"""Reachability in a flat program, forwards and backwards."""

from collections.abc import Container, Iterable, Sequence

from jax.extend import core as jex

from jaxgrad._jaxpr.source import Atom


def reads(eqn: jex.JaxprEqn, values: Container[jex.Var]) -> bool:
    """Whether an equation reads one of these values."""
    return any(isinstance(v, jex.Var) and v in values for v in eqn.invars)


def depending(eqns: Iterable[jex.JaxprEqn], values: Iterable[jex.Var]) -> set[jex.Var]:
    """The values that depend on one of these, themselves included; equations come in order."""
    found = set(values)
    for eqn in eqns:
        if reads(eqn, found):
            found.update(eqn.outvars)
    return found


def taken(jaxpr: jex.Jaxpr) -> set[jex.Var]:
    """The values that the equations or the outputs of a program read."""
    atoms = [*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]
    return {v for v in atoms if isinstance(v, jex.Var)}


def between(
    jaxpr: jex.Jaxpr,
    inputs: Sequence[jex.Var],
    outputs: Sequence[Atom],
    *,
    effects: bool = False,
) -> jex.Jaxpr:
    """The equations that compute some values from others, as a jaxpr of their own.

    Args:
        jaxpr: the program to take them from; it has no constants.
        inputs: the given values; the equations that compute them are left out.
        outputs: the wanted values.
        effects: whether to keep equations with side effects even if nothing reads their outputs.
    """
    given, needed = set(inputs), {v for v in outputs if isinstance(v, jex.Var)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        wanted = needed.intersection(eqn.outvars) - given
        if wanted or (effects and eqn.effects):
            kept.append(eqn)
            needed.update(v for v in eqn.invars if isinstance(v, jex.Var))
    kept.reverse()
    return jaxpr.replace(
        constvars=[],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=kept,
        effects=union_of_effects(kept),
    )


def union_of_effects(eqns: Iterable[jex.JaxprEqn]) -> frozenset[jex.Effect]:
    """The side effects of running these equations."""
    return frozenset(effect for eqn in eqns for effect in eqn.effects)
