"""Draws consecutive modules that do the same as one node with a count."""

import dataclasses
from collections.abc import Hashable, Mapping

from jaxgrad._drawing.groups import Group, shape
from jaxgrad._drawing.nodes import Diagram, Edge


def folded(drawn: Diagram, groups: Mapping[str, Group]) -> Diagram:
    """Draws consecutive modules that do the same as one node with a count."""
    runs = _alike(drawn, groups)
    into = {key: head for head, run in runs.items() for key in run}
    nodes = {k: n for k, n in drawn.nodes.items() if into.get(k, k) == k}
    for head, run in runs.items():
        if len(run) > 1:
            first, last = (drawn.nodes[k] for k in (run[0], run[-1]))
            detail = f"× {len(run)}" + (f", each {first.detail}" if first.detail else "")
            label = f"{first.label} … {last.label}"
            nodes[head] = dataclasses.replace(first, label=label, detail=detail)
    edges: dict[tuple[str, str], Edge] = {}
    for e in drawn.edges:
        source, target = into.get(e.source, e.source), into.get(e.target, e.target)
        if source != target:
            edges.setdefault((source, target), dataclasses.replace(e, source=source, target=target))
    return Diagram(nodes, list(edges.values()))


def _alike(drawn: Diagram, groups: Mapping[str, Group]) -> dict[str, list[str]]:
    """Runs of modules that do the same, by the first one's key."""
    after: dict[str, list[str]] = {}
    before: dict[str, list[str]] = {}
    for e in drawn.edges:
        after.setdefault(e.source, []).append(e.target)
        if e.source in groups:
            before.setdefault(e.target, []).append(e.source)
    cut = {e.target for e in drawn.edges if e.staged}
    heads: dict[str, str] = {}
    runs: dict[str, list[str]] = {}
    for key, group in groups.items():
        if group.node.kind != "module":
            continue
        previous = before.get(key, [])
        head = heads.get(previous[0]) if len(previous) == 1 else None
        follows = head is not None and after[previous[0]] == [key] and key not in cut
        if head is None or not follows or _does(groups[head]) != _does(group):
            head = key
        heads[key] = head
        runs.setdefault(head, []).append(key)
    return runs


def _does(group: Group) -> tuple[Hashable, ...]:
    """What two modules must share to be drawn as one."""
    primitives = tuple(e.primitive.name for e in group.eqns)
    shapes = tuple(map(shape, [*group.params, *group.eqns[-1].outvars]))
    return group.node.state, primitives, len(group.params), shapes
