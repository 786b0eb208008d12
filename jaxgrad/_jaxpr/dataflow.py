"""What depends on what in a flat program, forwards and backwards."""

from collections.abc import Iterable, Sequence

from jax.extend import core as jex


def depending(jaxpr: jex.Jaxpr, inputs: Sequence[jex.Var] | frozenset[jex.Var]) -> set[jex.Var]:
    found = set(inputs)
    for eqn in jaxpr.eqns:
        if any(v in found for v in eqn.invars if isinstance(v, jex.Var)):
            found.update(eqn.outvars)
    return found


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
