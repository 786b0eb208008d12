"""Flattens a jaxpr of nested calls into one list of equations.

A jaxpr nests wherever its author wrote `jax.jit`, `jax.checkpoint` or a custom derivative, and
staging can't split a nested call: its frozen half would stay inside. So calls are inlined, as far
as that changes nothing but the nesting:

- `jit` always;
- a custom derivative or a checkpoint whose inputs are all frozen, since nobody differentiates it;
- of a checkpoint with trainable inputs, the equations that do not depend on them. The others stay
  under the checkpoint, which exists to save their memory in the backward pass;
- a custom derivative with trainable inputs stays, or its rule would be lost;
- `scan`, `while` and `cond` stay: their bodies run a variable number of times. Only a scan over
  layers with the first ones frozen is cut in two (`split_scan.py`).

Arrays that the function or a nested call closes over become inputs: the flat program has no
constants, and what depends on these arrays is followed like everything else.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from jax.extend import core as jex
from jax.extend import source_info_util
from jax.typing import ArrayLike

from jaxgrad._jaxpr.dataflow import between, reads, taken
from jaxgrad._jaxpr.source import Atom
from jaxgrad._jaxpr.split_scan import split_scan
from jaxgrad._jaxpr.views import Call, Checkpoint, CustomRule, Scan, view

Source: TypeAlias = source_info_util.SourceInfo


class Inlined(NamedTuple):
    """A flat program whose first inputs are the arrays that the function closes over.

    Attributes:
        jaxpr: the program; it has no constants.
        consts: the arrays that the function closes over.
    """

    jaxpr: jex.Jaxpr
    consts: list[ArrayLike]

    @property
    def captured(self) -> list[jex.Var]:
        """The inputs that stand for the arrays in `consts`."""
        return self.jaxpr.invars[: len(self.consts)]

    @property
    def invars(self) -> list[jex.Var]:
        """The inputs of the function itself."""
        return self.jaxpr.invars[len(self.consts) :]


def inline(program: jex.ClosedJaxpr, varying: Sequence[bool]) -> Inlined:
    """Inlines nested calls and drops dead equations.

    Args:
        program: the function as `jax.make_jaxpr` gives it.
        varying: for each input, whether the function may be differentiated with respect to it, or
            it changes from step to step.
    """
    builder = _Builder()
    invars = [builder.fresh(v) for v in program.jaxpr.invars]
    builder.varying.update(v for v, varies in zip(invars, varying, strict=True) if varies)
    outs = builder.call(program, invars, source_info_util.new_source_info())
    flat = program.jaxpr.replace(constvars=[], invars=invars, outvars=outs, eqns=builder.eqns)
    flat = between(flat, invars, outs, effects=True)
    needed = taken(flat)
    captured = {v: value for v, value in builder.consts.items() if v in needed}
    return Inlined(flat.replace(invars=[*captured, *invars]), list(captured.values()))


def _nested(inner: Source, outer: Source) -> Source:
    """The source of an equation in a call; JAX's own functions get the line that calls them."""
    stack = outer.name_stack + inner.name_stack
    line = inner if source_info_util.summarize(inner) else outer
    return inner.replace(traceback=line.traceback, name_stack=stack)


class _Builder:
    """Collects equations over fresh variables, since an inlined jaxpr may occur more than once."""

    def __init__(self) -> None:
        self.eqns: list[jex.JaxprEqn] = []
        self.consts: dict[jex.Var, ArrayLike] = {}
        self.varying: set[jex.Var] = set()

    def fresh(self, var: jex.Var) -> jex.Var:
        return jex.Var(var.aval)

    def varies(self, eqn: jex.JaxprEqn) -> bool:
        return reads(eqn, self.varying)

    def call(self, program: jex.ClosedJaxpr, args: Sequence[Atom], source: Source) -> list[Atom]:
        """Appends the equations of a program and returns its outputs.

        Args:
            program: the program, closed.
            args: the values that it is called with.
            source: where it is called.
        """
        jaxpr = program.jaxpr
        env: dict[jex.Var, Atom] = dict(zip(jaxpr.invars, args, strict=True))
        for var, value in zip(jaxpr.constvars, program.consts, strict=True):
            env[var] = self.constant(var, value)

        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            eqn = eqn.replace(
                invars=[read(v) for v in eqn.invars],
                source_info=_nested(eqn.source_info, source),
            )
            env.update(zip(eqn.outvars, self.equation(eqn), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def constant(self, var: jex.Var, value: ArrayLike) -> jex.Var:
        known = next((v for v, c in self.consts.items() if c is value), None)
        if known is None:
            known = self.fresh(var)
            self.consts[known] = value
        return known

    def equation(self, eqn: jex.JaxprEqn) -> Sequence[Atom]:
        match view(eqn):
            case CustomRule() | Checkpoint() as call if not self.varies(eqn):
                return self.call(call.body, eqn.invars, eqn.source_info)
            case CustomRule():
                return self.append(eqn)
            case Checkpoint() as checkpoint:
                return self.append(eqn) if eqn.effects else self.checkpoint(eqn, checkpoint)
            case Call(body):
                return self.call(body, eqn.invars, eqn.source_info)
            case Scan() as scan if parts := split_scan(eqn, scan, self.eqns, self.varying):
                new = len(self.eqns)
                outs = self.call(parts.program, eqn.invars + parts.extra, eqn.source_info)
                made = self.eqns[new:]
                self.eqns[new:] = [e.replace(source_info=eqn.source_info) for e in made]
                return outs
        return self.append(eqn)

    def append(self, eqn: jex.JaxprEqn) -> list[jex.Var]:
        outs = [self.fresh(v) for v in eqn.outvars]
        if self.varies(eqn):
            self.varying.update(outs)
        self.eqns.append(eqn.replace(outvars=outs))
        return outs

    def checkpoint(self, eqn: jex.JaxprEqn, checkpoint: Checkpoint) -> list[Atom]:
        """Moves the frozen equations out of a checkpoint and leaves the others in it."""
        outer, self.eqns = self.eqns, []
        outs = self.call(checkpoint.body, eqn.invars, eqn.source_info)
        body, self.eqns = self.eqns, outer
        inside = [e for e in body if self.varies(e)]
        self.eqns += [e for e in body if not self.varies(e)]
        made = {v for e in inside for v in e.outvars}
        results = list(dict.fromkeys(v for v in outs if isinstance(v, jex.Var) and v in made))
        used = (v for e in inside for v in e.invars if isinstance(v, jex.Var) and v not in made)
        jaxpr = checkpoint.body.jaxpr.replace(
            constvars=[], invars=list(dict.fromkeys(used)), outvars=results, eqns=inside
        )
        appended = self.append(checkpoint.replace(eqn, jaxpr, results))
        renamed = dict(zip(results, appended, strict=True))
        return [renamed.get(v, v) if isinstance(v, jex.Var) else v for v in outs]
