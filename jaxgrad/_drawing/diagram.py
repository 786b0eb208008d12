"""Turns a traced function into nodes and edges: operations or modules, leaves and values."""

from collections.abc import Mapping, Set
from typing import NamedTuple

from jax.extend import core as jex

from jaxgrad._drawing.folding import folded
from jaxgrad._drawing.groups import Group, Inputs, Program, analysed, groups_of, read, shape
from jaxgrad._drawing.nodes import Diagram, Edge, Node


def diagram(jaxpr: jex.Jaxpr, inputs: Inputs, depth: int) -> Diagram:
    """Returns the diagram of a jaxpr.

    Args:
        jaxpr: the equations, inlined.
        inputs: the roles of its inputs.
        depth: draw modules to this depth as one node each; 0 draws operations.
    """
    program = analysed(jaxpr, inputs, depth)
    groups = groups_of(program)
    leaves = _leaves(program, groups)
    arrows = {**_arrows(inputs, groups), **{(x.node.key, x.reader): x.var for x in leaves}}
    nodes = {key: group.node for key, group in groups.items()}
    nodes |= {leaf.node.key: leaf.node for leaf in leaves}
    nodes |= _input_nodes(inputs, {source for source, _ in arrows})
    edges = [
        Edge(
            source,
            target,
            shape(v) if source in groups else "",
            v in program.trained,
            v in inputs.staged and nodes[target].state == "trained",
        )
        for (source, target), v in arrows.items()
    ]
    outputs = _outputs(program, groups)
    drawn = Diagram(
        nodes | {node.key: node for node, _ in outputs}, edges + [edge for _, edge in outputs]
    )
    return folded(drawn, groups) if depth else drawn


def _made(groups: Mapping[str, Group]) -> dict[jex.Var, str]:
    """The node that each value comes from."""
    return {v: key for key, group in groups.items() for e in group.eqns for v in e.outvars}


def _arrows(inputs: Inputs, groups: Mapping[str, Group]) -> dict[tuple[str, str], jex.Var]:
    """The first value that each node reads from each other node or input; not its parameters."""
    made = {v: f"i{name}" for v, name in inputs.data.items()} | _made(groups)
    arrows: dict[tuple[str, str], jex.Var] = {}
    for key, group in groups.items():
        for v in read(group.eqns):
            if v in made and made[v] != key:
                arrows.setdefault((made[v], key), v)
    return arrows


class _Leaf(NamedTuple):
    """A parameter beside one of its readers."""

    node: Node
    reader: str
    var: jex.Var


def _leaves(program: Program, groups: Mapping[str, Group]) -> list[_Leaf]:
    """The parameters that operations and calls read; a module contains its own."""
    readers: dict[jex.Var, list[Node]] = {}
    for group in groups.values():
        if group.node.kind != "module":
            for var in group.params:
                readers.setdefault(var, []).append(group.node)
    # One leaf for each reader: an arrow across the drawing would say less.
    return [
        _leaf(program, var, reader, shared=len(nodes) > 1)
        for var, nodes in readers.items()
        for reader in nodes
    ]


def _leaf(program: Program, var: jex.Var, reader: Node, *, shared: bool) -> _Leaf:
    path = program.inputs.params[var]
    label = path.removeprefix(f"{reader.module}/") if reader.module else path
    detail = shape(var) + ", shared" * shared
    state, key = program.state([var]), f"p{path} {reader.key}"
    node = Node(key, "param", label, detail, state, reader.module, reader.frame)
    return _Leaf(node, reader.key, var)


def _input_nodes(inputs: Inputs, sources: Set[str]) -> dict[str, Node]:
    """The inputs that are not parameters and that an arrow starts from."""
    nodes = (Node(f"i{name}", "input", name, shape(v)) for v, name in inputs.data.items())
    return {node.key: node for node in nodes if node.key in sources}


def _outputs(program: Program, groups: Mapping[str, Group]) -> list[tuple[Node, Edge]]:
    """A node, and the arrow to it, for each result that a drawn node makes."""
    made, results = _made(groups), program.jaxpr.outvars
    shown = dict.fromkeys(v for v in results if isinstance(v, jex.Var) and v in made)
    name = "value" if len(results) == 1 else "output {}"
    return [
        (
            Node(f"o{i}", "output", name.format(i)),
            Edge(made[v], f"o{i}", shape(v), v in program.trained, False),
        )
        for i, v in enumerate(shown)
    ]
