"""What depends on what in a flat program, forwards and backwards."""

from collections.abc import Container, Iterable, Sequence

from jax.extend import core as jex


def reads(eqn: jex.JaxprEqn, values: Container[jex.Var]) -> bool:
    """Whether an equation takes one of these values."""
    return any(isinstance(v, jex.Var) and v in values for v in eqn.invars)


def depending(eqns: Iterable[jex.JaxprEqn], values: Iterable[jex.Var]) -> set[jex.Var]:
    """The values that depend on one of these, themselves included; equations in their order."""
    found = set(values)
    for eqn in eqns:
        if reads(eqn, found):
            found.update(eqn.outvars)
    return found


def taken(jaxpr: jex.Jaxpr) -> set[jex.Var]:
    """The values that the equations or the outputs of a program take."""
    atoms = [*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]
    return {v for v in atoms if isinstance(v, jex.Var)}


def between(
    jaxpr: jex.Jaxpr,
    inputs: Sequence[jex.Var],
    outputs: Sequence[jex.Var | jex.Literal],
    *,
    effects: bool = False,
) -> jex.Jaxpr:
    """The equations that lead from some values to others, as a jaxpr of its own.

    Args:
        jaxpr: where to take them from; it has no constants.
        inputs: the values that are given; what they were computed from is left out.
        outputs: the values that are wanted.
        effects: whether equations with side effects stay although nothing needs their outputs.
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
    """What running these equations does beside computing values."""
    return frozenset(effect for eqn in eqns for effect in eqn.effects)
