"""Groups the equations of a program into the operations, calls and modules to draw.

The diagram is made to be read. Equations that only relabel a parameter are left out, and the
equations of one library call become one node with its name.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from jax.extend import core as jex

from jaxgrad._drawing.nodes import Node
from jaxgrad._drawing.owners import frames, modules
from jaxgrad._jaxpr.dataflow import depending
from jaxgrad._jaxpr.source import aval
from jaxgrad._text import si

_RELABELS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The roles of a jaxpr's inputs.

    Attributes:
        params: the parameters and their paths.
        data: the other inputs and their names.
        trained: the trained parameters; None if the picture does not tell them apart.
        staged: the values that staging stores.
    """

    params: Mapping[jex.Var, str]
    data: Mapping[jex.Var, str]
    trained: frozenset[jex.Var] | None
    staged: frozenset[jex.Var]


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with the facts about its equations and values that a diagram needs.

    Attributes:
        jaxpr: the equations.
        inputs: the roles of its inputs.
        depth: see `diagram`.
        owners: the module of each equation, or None.
        calls: the library function that each equation was called by, or None.
        trained: the values that depend on trained parameters.
        relabelled: the values that are a parameter in another shape or dtype, and that parameter.
    """

    jaxpr: jex.Jaxpr
    inputs: Inputs
    depth: int
    owners: Sequence[str | None]
    calls: Sequence[str | None]
    trained: Set[jex.Var]
    relabelled: Mapping[jex.Var, jex.Var]

    def state(self, values: Iterable[jex.Var]) -> str:
        """The state of a node that holds these values."""
        if self.inputs.trained is None:
            return ""
        return "frozen" if self.trained.isdisjoint(values) else "trained"


def analysed(jaxpr: jex.Jaxpr, inputs: Inputs, depth: int) -> Program:
    """Finds out what the steps of `diagram` need to know about a jaxpr."""
    owners = modules(jaxpr, inputs.params, depth or None)
    trained = depending(jaxpr.eqns, inputs.trained or ())
    relabelled = _relabelled(jaxpr, inputs.params)
    return Program(jaxpr, inputs, depth, owners, _calls(jaxpr, owners), trained, relabelled)


class Group(NamedTuple):
    """The equations that one node stands for, and the parameters that they read."""

    node: Node
    eqns: Sequence[jex.JaxprEqn]
    params: Sequence[jex.Var]


def groups_of(program: Program) -> dict[str, Group]:
    """The operations, calls and modules to draw, by node key, in order."""
    groups: dict[str, Group] = {}
    frame = ""
    for kind, name, run in _runs(program):
        eqns = [program.jaxpr.eqns[i] for i in run]
        params = _params(program, eqns)
        key = f"n{run[0]}"
        label = name or _label(eqns)
        detail = _counted(params) if kind == "module" else ""
        state = program.state(v for e in eqns for v in e.outvars)
        module = (program.owners[run[0]] or "") if kind == "op" and not program.depth else ""
        # Consecutive operations of one module share a frame; a later call of it gets another.
        frame = module and (frame if frame.startswith(f"{module} ") else f"{module} {key}")
        groups[key] = Group(Node(key, kind, label, detail, state, module, frame), eqns, params)
    return groups


def read(eqns: Iterable[jex.JaxprEqn]) -> Iterator[jex.Var]:
    """The values that equations read, with repeats."""
    return (v for eqn in eqns for v in eqn.invars if isinstance(v, jex.Var))


def shape(var: jex.Var) -> str:
    """The shape of a value, as in `8 × 784`."""
    return " × ".join(map(str, aval(var).shape)) or "scalar"


def _runs(program: Program) -> Iterator[tuple[str, str, list[int]]]:
    """The kind, the name and the equations (by index) of each node."""
    eqns, staged = program.jaxpr.eqns, program.inputs.staged

    def is_frozen(i: int) -> bool:
        return program.trained.isdisjoint(eqns[i].outvars)

    def node(i: int) -> tuple[str, str, int]:
        if call := program.calls[i]:
            return "call", call, 0
        if program.depth and (owner := program.owners[i]):
            return "module", owner, 0
        return "op", "", is_frozen(i) if program.depth else i

    for (kind, name, _), run in itertools.groupby(_drawn(program), node):
        indices = list(run)
        if staged.isdisjoint(v for i in indices for v in eqns[i].outvars):
            yield kind, name, indices
        else:  # two nodes, so that the value that staging stores is on an arrow
            yield from ((kind, name, list(p)) for _, p in itertools.groupby(indices, is_frozen))


def _drawn(program: Program) -> list[int]:
    """The equations that depend on an input and do more than relabel a parameter."""
    inputs, eqns = program.inputs, program.jaxpr.eqns
    live = depending(eqns, [*inputs.params, *inputs.data])
    return [
        i
        for i, eqn in enumerate(eqns)
        if not live.isdisjoint(eqn.outvars) and program.relabelled.keys().isdisjoint(eqn.outvars)
    ]


def _params(program: Program, eqns: Iterable[jex.JaxprEqn]) -> list[jex.Var]:
    """The parameters that equations read, each once."""
    sources = (program.relabelled.get(v, v) for v in read(eqns))
    return list(dict.fromkeys(v for v in sources if v in program.inputs.params))


def _relabelled(jaxpr: jex.Jaxpr, params: Mapping[jex.Var, str]) -> dict[jex.Var, jex.Var]:
    """The values that are a parameter in another shape or dtype, and that parameter."""
    found: dict[jex.Var, jex.Var] = {}
    for eqn in jaxpr.eqns:
        given = [v for v in eqn.invars if isinstance(v, jex.Var)]
        if eqn.primitive.name in _RELABELS and len(given) == 1:
            source = found.get(given[0], given[0])
            if source in params:
                found.update(dict.fromkeys(eqn.outvars, source))
    return found


def _calls(jaxpr: jex.Jaxpr, owners: Sequence[str | None]) -> list[str | None]:
    """For each equation outside modules, the library function that created it, or None."""
    stacks = [[f.function for f in frames(eqn)] for eqn in jaxpr.eqns]
    first, last = min(stacks, default=[]), max(stacks, default=[])
    outer = sum(
        1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(first, last, strict=False))
    )
    names: list[str | None] = []
    for owner, stack in zip(owners, stacks, strict=True):
        inner = stack[outer:]
        body = owner or not inner or any(n.endswith(("__call__", ">")) for n in inner)
        names.append(None if body else inner[0].rpartition(".")[2])
    alone = {n for n in names if n and names.count(n) < 3}
    return [None if n in alone else n for n in names]


def _label(eqns: Sequence[jex.JaxprEqn]) -> str:
    names = list(dict.fromkeys(e.primitive.name for e in eqns))
    names = [n for n in names if n not in _RELABELS] or names
    rest = f" +{len(names) - 3}" if len(names) > 3 else ""
    return " · ".join(names[:3]) + rest


def _counted(params: Sequence[jex.Var]) -> str:
    if not params:
        return ""
    weights = f"{si(sum(math.prod(aval(v).shape) for v in params))} weights"
    return f"{len(params)} arrays, {weights}" if len(params) > 1 else weights
