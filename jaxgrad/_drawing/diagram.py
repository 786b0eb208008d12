"""A traced function as a drawing's nodes and edges: operations or modules, leaves and values.

What is drawn is chosen to be read: what only relabels a parameter is not shown, a run of equations
from one library call is one node by its name, and modules in a row that do the same are one node
with a count.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.extend import core as jex

from jaxgrad._drawing.owners import frames, modules
from jaxgrad._jaxpr.dataflow import depending
from jaxgrad._jaxpr.source import aval

_RELABELS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}


@dataclasses.dataclass
class Node:
    """One box.

    Attributes:
        key: its name in edges.
        kind: "param", "input", "op", "call" (a library function), "module" or "output".
        label: what is written in it.
        detail: the smaller line below.
        state: "trained", "frozen", or "" for what is neither.
        module: the module that it is an operation or a parameter of, or "".
        frame: which frame it is drawn inside of: one for each time that a module is called.
    """

    key: str
    kind: str
    label: str
    detail: str = ""
    state: str = ""
    module: str = ""
    frame: str = ""


@dataclasses.dataclass(frozen=True)
class Edge:
    """One arrow: a value.

    Attributes:
        source: the node that makes it.
        target: the node that takes it.
        label: its shape.
        trained: whether it depends on trained parameters.
        staged: whether it is what staging stores.
    """

    source: str
    target: str
    label: str
    trained: bool
    staged: bool


@dataclasses.dataclass
class Diagram:
    """What to draw."""

    nodes: dict[str, Node]
    edges: list[Edge]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the inputs of a jaxpr are.

    Attributes:
        params: paths of the parameters.
        data: names of the other inputs.
        trained: the parameters that are trained; None where nothing is said about that.
        staged: the values that staging stores.
    """

    params: Mapping[jex.Var, str]
    data: Mapping[jex.Var, str]
    trained: frozenset[jex.Var] | None
    staged: frozenset[jex.Var]


def diagram(jaxpr: jex.Jaxpr, inputs: Inputs, depth: int | None) -> Diagram:
    """Returns the diagram of a jaxpr.

    Args:
        jaxpr: the equations, inlined.
        inputs: what its inputs are.
        depth: modules to this depth are one node each; 0 draws the operations.
    """
    owners = modules(jaxpr, inputs.params, depth or None)
    live = depending(jaxpr.eqns, [*inputs.params, *inputs.data])
    bright = depending(jaxpr.eqns, inputs.trained or ())
    plain = _relabelled(jaxpr, inputs.params)
    names = _names(jaxpr, owners)
    kept = [
        i
        for i, eqn in enumerate(jaxpr.eqns)
        if any(v in live for v in eqn.outvars) and not any(v in plain for v in eqn.outvars)
    ]

    def group(i: int) -> tuple[str, object]:
        if names[i]:
            return "call", names[i]
        if depth:
            return ("module", owners[i]) if owners[i] else ("op", bright.isdisjoint(outs(i)))
        return "op", i

    def outs(i: int) -> list[jex.Var]:
        return jaxpr.eqns[i].outvars

    def parts(run: list[int]) -> Iterable[list[int]]:
        """One node, or two where what staging stores is between them."""
        if not any(v in inputs.staged for i in run for v in outs(i)):
            return [run]
        return [
            list(part) for _, part in itertools.groupby(run, lambda i: bright.isdisjoint(outs(i)))
        ]

    made: dict[jex.Var, str] = {}
    nodes: dict[str, Node] = {}
    members: dict[str, list[jex.JaxprEqn]] = {}
    frame = ""
    runs = (
        (*what, part) for what, run in itertools.groupby(kept, group) for part in parts(list(run))
    )
    for kind, name, run in runs:
        eqns = [jaxpr.eqns[i] for i in run]
        shines = any(v in bright for e in eqns for v in e.outvars)
        key = f"n{run[0]}"
        state = "" if inputs.trained is None else "trained" if shines else "frozen"
        label = _label(eqns) if kind == "op" else str(name)
        module = (owners[run[0]] or "") if kind == "op" and not depth else ""
        frame = module and (frame if frame.startswith(f"{module} ") else f"{module} {key}")
        nodes[key], members[key] = Node(key, kind, label, "", state, module, frame), eqns
        made.update({v: key for e in eqns for v in e.outvars})
    used: dict[tuple[str, str], tuple[jex.Var, jex.Var]] = {}
    inside: dict[str, list[jex.Var]] = {key: [] for key in nodes}
    readers: dict[jex.Var, list[str]] = {}
    for key, eqns in members.items():
        for v in (v for e in eqns for v in e.invars if isinstance(v, jex.Var)):
            source = plain.get(v, v)
            if source in inputs.params:
                if nodes[key].kind == "module":
                    inside[key] += [source] * (source not in inside[key])
                else:
                    reading = readers.setdefault(source, [])
                    reading += [key] * (key not in reading)
            elif source in inputs.data:
                used.setdefault((f"i{inputs.data[source]}", key), (source, v))
            elif v in made and made[v] != key:
                used.setdefault((made[v], key), (v, v))
    for var, keys in readers.items():
        path, detail = inputs.params[var], shape(var) + ", shared" * (len(keys) > 1)
        state = "" if inputs.trained is None else "trained" if var in inputs.trained else "frozen"
        for reader in keys:  # one at each: an arrow across the drawing tells less
            module, leaf = nodes[reader].module, f"p{path} {reader}"
            label = path.removeprefix(f"{module}/") if module else path
            nodes[leaf] = Node(leaf, "param", label, detail, state, module, nodes[reader].frame)
            used[leaf, reader] = var, var
    for var, name in inputs.data.items():
        if any(key == f"i{name}" for key, _ in used):
            nodes[f"i{name}"] = Node(f"i{name}", "input", name, shape(var))
    for key, params in inside.items():
        nodes[key].detail = _counted(params)
    edges = [
        Edge(
            a,
            b,
            shape(seen) if a[0] == "n" else "",
            v in bright,
            v in inputs.staged and nodes[b].state == "trained",
        )
        for (a, b), (v, seen) in used.items()
    ]
    _add_outputs(jaxpr, nodes, edges, made, bright)
    return (
        _folded(Diagram(nodes, edges), members, inside, inputs) if depth else Diagram(nodes, edges)
    )


def shape(var: jex.Var) -> str:
    """The shape of a value, as `8 × 784`."""
    return " × ".join(map(str, aval(var).shape)) or "scalar"


def _add_outputs(jaxpr, nodes, edges, made, bright):
    """A node for each result that something drawn makes."""
    outs = [v for v in jaxpr.outvars if isinstance(v, jex.Var) and v in made]
    for i, v in enumerate(dict.fromkeys(outs)):
        key = f"o{i}"
        name = "value" if len(jaxpr.outvars) == 1 else f"output {i}"
        nodes[key] = Node(key, "output", name, "", "")
        edges.append(Edge(made[v], key, shape(v), v in bright, False))


def _relabelled(jaxpr: jex.Jaxpr, params: Mapping[jex.Var, str]) -> dict[jex.Var, jex.Var]:
    """Values that are a parameter in another shape or dtype, and which."""
    found: dict[jex.Var, jex.Var] = {}
    for eqn in jaxpr.eqns:
        given = [v for v in eqn.invars if isinstance(v, jex.Var)]
        if eqn.primitive.name in _RELABELS and len(given) == 1:
            source = found.get(given[0], given[0])
            if source in params:
                found.update(dict.fromkeys(eqn.outvars, source))
    return found


def _names(jaxpr: jex.Jaxpr, owners: Sequence[str | None]) -> list[str | None]:
    """For equations of no module, the function that the drawn one calls to make them."""
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
    told = [n for n in names if n not in _RELABELS] or names
    rest = f" +{len(told) - 3}" if len(told) > 3 else ""
    return " · ".join(told[:3]) + rest


def _counted(params: Sequence[jex.Var]) -> str:
    if not params:
        return ""
    n = sum(math.prod(aval(v).shape) for v in params)
    return (
        f"{len(params)} arrays, {_short(n)} numbers" if len(params) > 1 else f"{_short(n)} numbers"
    )


def _short(n: float) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000 or unit == "G":
            break
        n /= 1000
    return f"{n:.3g}{unit}"


def _folded(
    whole: Diagram,
    members: Mapping[str, Sequence[jex.JaxprEqn]],
    inside: Mapping[str, Sequence[jex.Var]],
    inputs: Inputs,
) -> Diagram:
    """Modules in a row that do the same as one node with a count."""

    def same(key: str) -> tuple:
        node = whole.nodes[key]
        primitives = tuple(e.primitive.name for e in members[key])
        shapes = tuple(shape(v) for v in inside[key])
        return node.state, primitives, shapes, tuple(shape(v) for v in members[key][-1].outvars)

    nexts: dict[str, list[str]] = {}
    lasts: dict[str, list[str]] = {}
    for e in whole.edges:
        nexts.setdefault(e.source, []).append(e.target)
        lasts.setdefault(e.target, []).append(e.source)
    into: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    for key, node in whole.nodes.items():
        if node.kind != "module":
            continue
        before = [k for k in lasts.get(key, ()) if k[0] == "n"]
        head = into.get(before[0], before[0]) if len(before) == 1 else None
        if (
            head in rows
            and nexts[before[0]] == [key]
            and not any(e.staged for e in whole.edges if e.target == key)
            and same(head) == same(key)
        ):
            into[key] = head
            rows[head].append(key)
        else:
            rows[key] = [key]
    nodes = {k: n for k, n in whole.nodes.items() if k not in into}
    for head, run in rows.items():
        if len(run) > 1:
            first, last = (whole.nodes[k].label for k in (run[0], run[-1]))
            count = sum(len(inside[k]) for k in run)
            nodes[head] = dataclasses.replace(
                whole.nodes[head],
                label=f"{first} … {last}",
                detail=f"× {len(run)}, each {_counted(inside[head])}" if count else f"× {len(run)}",
            )
    edges = {}
    for e in whole.edges:
        source, target = into.get(e.source, e.source), into.get(e.target, e.target)
        if source != target:
            edges.setdefault((source, target), dataclasses.replace(e, source=source, target=target))
    return Diagram(nodes, list(edges.values()))
