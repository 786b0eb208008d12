"""One flat list of equations out of a jaxpr of nested calls.

A jaxpr nests wherever its author wrote `jax.jit`, `jax.checkpoint` or a custom derivative, and
a nested call is all or nothing: its frozen half can't be taken out. So calls are inlined, as
far as that changes nothing but the nesting:

- `jit` always;
- a custom derivative or a checkpoint with frozen inputs only, as nobody differentiates it;
- of a checkpoint with trainable inputs, the equations that do not depend on them. The others
  stay under the checkpoint, whose point is their memory in the backward pass;
- a custom derivative with trainable inputs stays whole, or its rule would be lost;
- `scan`, `while` and `cond` stay whole: their bodies run a number of times. Only a scan over
  layers whose first ones are frozen is cut in two (`_scan.py`).
"""

from collections.abc import Iterable, Sequence

from jax.extend import core as jex
from jax.extend import source_info_util
from jax.extend.core import primitives

from jaxgrad._scan import split_scan

_CALLS = {
    primitives.jit_p: "jaxpr",
    primitives.closed_call_p: "call_jaxpr",
    primitives.call_p: "call_jaxpr",
}
_WHOLE_WHERE_DIFFERENTIATED = {
    primitives.custom_jvp_call_p: "call_jaxpr",
    primitives.custom_vjp_call_p: "call_jaxpr",
    primitives.remat_p: "jaxpr",
}


def inline(closed: jex.ClosedJaxpr, varying: Sequence[bool]) -> jex.ClosedJaxpr:
    """The same function with nested calls inlined and dead equations dropped.

    Args:
        closed: the function as `jax.make_jaxpr` gives it.
        varying: for each input, whether the function may be differentiated by it, or it
            changes from step to step.
    """
    builder = _Builder()
    jaxpr = closed.jaxpr
    invars = [builder.fresh(v) for v in jaxpr.invars]
    builder.varying.update(v for v, varies in zip(invars, varying, strict=True) if varies)
    outs = builder.call(jaxpr, closed.consts, invars, source_info_util.new_source_info())
    flat = jaxpr.replace(
        constvars=list(builder.consts), invars=invars, outvars=outs, eqns=builder.eqns
    )
    flat = between(flat, invars, outs, effects=True)
    return jex.ClosedJaxpr(flat, [builder.consts[v] for v in flat.constvars])


def between(
    jaxpr: jex.Jaxpr,
    inputs: Sequence[jex.Var],
    outputs: Sequence[jex.Var | jex.Literal],
    *,
    effects: bool = False,
) -> jex.Jaxpr:
    """The equations that lead from some values to others, as a jaxpr of its own.

    Args:
        jaxpr: where to take them from.
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
        constvars=[v for v in jaxpr.constvars if v in needed - given],
        invars=list(inputs),
        outvars=list(outputs),
        eqns=kept,
        effects=union_of_effects(kept),
    )


def union_of_effects(eqns: Iterable[jex.JaxprEqn]) -> frozenset[jex.Effect]:
    """What running these equations does beside computing values."""
    return frozenset(effect for eqn in eqns for effect in eqn.effects)


def _nested(inner, outer):
    """The source of an equation in a call; JAX's own functions have the line that calls them."""
    stack = outer.name_stack + inner.name_stack
    line = inner if source_info_util.summarize(inner) else outer
    return inner.replace(traceback=line.traceback, name_stack=stack)


class _Builder:
    """Collects equations over fresh variables: an inlined jaxpr may occur more than once."""

    def __init__(self) -> None:
        self.eqns: list[jex.JaxprEqn] = []
        self.consts: dict[jex.Var, object] = {}
        self.varying: set[jex.Var] = set()

    def fresh(self, var: jex.Var) -> jex.Var:
        return jex.Var(var.aval)

    def varies(self, eqn: jex.JaxprEqn) -> bool:
        return any(v in self.varying for v in eqn.invars if isinstance(v, jex.Var))

    def call(self, jaxpr, consts, args, source):
        """Appends a jaxpr's equations, called with these arguments; returns its outputs.

        Args:
            jaxpr: the jaxpr.
            consts: the values of its constants.
            args: the atoms it is called with.
            source: where it is called.
        """
        env = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.constant(var, value)

        def read(atom):
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            eqn = eqn.replace(
                invars=[read(v) for v in eqn.invars],
                source_info=_nested(eqn.source_info, source),
            )
            env.update(zip(eqn.outvars, self.equation(eqn), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def constant(self, var, value):
        known = next((v for v, c in self.consts.items() if c is value), None)
        if known is None:
            known = self.fresh(var)
            self.consts[known] = value
        return known

    def equation(self, eqn):
        body = _CALLS.get(eqn.primitive)
        if body is None and not self.varies(eqn):
            body = _WHOLE_WHERE_DIFFERENTIATED.get(eqn.primitive)
        if body is not None:
            inner = eqn.params[body]
            closed = isinstance(inner, jex.ClosedJaxpr)
            jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, [])
            return self.call(jaxpr, consts, eqn.invars, eqn.source_info)
        if eqn.primitive is primitives.remat_p and not eqn.effects:
            return self.checkpoint(eqn)
        if eqn.primitive is primitives.scan_p and (
            parts := split_scan(eqn, self.eqns, self.varying)
        ):
            new = len(self.eqns)
            outs = self.call(parts.jaxpr, parts.consts, eqn.invars + parts.extra, eqn.source_info)
            self.eqns[new:] = [e.replace(source_info=eqn.source_info) for e in self.eqns[new:]]
            return outs
        return self.append(eqn)

    def append(self, eqn):
        outs = [self.fresh(v) for v in eqn.outvars]
        if self.varies(eqn):
            self.varying.update(outs)
        self.eqns.append(eqn.replace(outvars=outs))
        return outs

    def checkpoint(self, eqn):
        """Takes the frozen equations out of a checkpoint and leaves the others under it."""
        outer, self.eqns = self.eqns, []
        outs = self.call(eqn.params["jaxpr"], [], eqn.invars, eqn.source_info)
        body, self.eqns = self.eqns, outer
        inside = [e for e in body if self.varies(e)]
        self.eqns += [e for e in body if not self.varies(e)]
        made = {v for e in inside for v in e.outvars}
        results = list(dict.fromkeys(v for v in outs if isinstance(v, jex.Var) and v in made))
        used = (v for e in inside for v in e.invars if isinstance(v, jex.Var) and v not in made)
        inputs = list(dict.fromkeys(used))
        jaxpr = eqn.params["jaxpr"].replace(
            constvars=[], invars=inputs, outvars=results, eqns=inside
        )
        renamed = dict(
            zip(
                results,
                self.append(
                    eqn.replace(
                        invars=inputs, outvars=results, params={**eqn.params, "jaxpr": jaxpr}
                    )
                ),
                strict=True,
            )
        )
        return [renamed.get(v, v) if isinstance(v, jex.Var) else v for v in outs]
