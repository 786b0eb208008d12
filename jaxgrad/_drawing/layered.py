"""Places the boxes and arrows of a diagram in layers from top to bottom.

Sugiyama's method in its plainest form: rows by longest path, order within a row by barycentres,
horizontal positions by least squares. The longest path is the spine and stays straight, with each
parameter to the left of its reader and everything else to the right, so that a chain of layers
looks like one. A long arrow has a position of its own in each row, so that it passes between boxes.

Why no library: fast-sugiyama 0.5.3 (MIT, tried in November 2026) comes closest. It is
deterministic and faster, but `from_edges` takes no box sizes and knows no spine: widths, spine,
routes and blocks of parameters would stay here, and only about 60 lines would go. Residual blocks
look worse, as their arrows pass on both sides and strike out labels. `svg()`, which has no
dependency, would need an extra with compiled code, whose Linux wheels require glibc 2.34 where
jaxlib's require 2.27. Try it again when its Python API takes sizes, as the Rust crate below it
does. Graphviz is a system program, igraph is GPL, and grandalf has had no release since January
2023.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxgrad._drawing.nodes import Diagram, Node

CHAR, LINE = 0.602, 17  # character width as a fraction of its height; line height
FONT, SMALL = 12, 10
FRAME = (12, 22, 12, 10)  # margin of a module's frame: left, top, right, bottom
_GAP_X, _GAP_Y, _PAD, _LEAF_GAP = 40, 40, 11, 30
_GAP_FRAMES = 58  # fits a label between two frames


@dataclasses.dataclass
class Box:
    """A rectangle, given by its centre."""

    x: float
    y: float
    width: float
    height: float


@dataclasses.dataclass
class Layout:
    """Boxes by node key, and one route per edge, in the order of the edges."""

    boxes: dict[str, Box]
    routes: list["Route"]


class Route(NamedTuple):
    """The points of an arrow, and whether it points right instead of down."""

    points: list[tuple[float, float]]
    sideways: bool = False


def lines(node: Node) -> list[str]:
    """The label of a box; a long name wraps onto two lines."""
    label = node.label
    if len(label) > 26 and "_" in label:
        cuts = [i for i, c in enumerate(label) if c == "_"]
        cut = min(cuts, key=lambda i: abs(i - len(label) / 2))
        return [label[: cut + 1], label[cut + 1 :]]
    return [label]


def layout(diagram: Diagram) -> Layout:
    """Positions all nodes and arrows."""
    sizes = {key: _size(node) for key, node in diagram.nodes.items()}
    leaves = _leaves(diagram)
    rows, chains = _rows(diagram, leaves)
    # A box and its leaves form one block, with the box at its right end.
    left = {
        key: max((sizes[p][0] for p in stack), default=-_LEAF_GAP) + _LEAF_GAP
        for key, stack in leaves.items()
    }
    framed = {key: bool(node.frame) for key, node in diagram.nodes.items()}
    extents = {
        key: (
            width / 2 + left.get(key, 0) + FRAME[0] * framed[key],
            width / 2 + FRAME[2] * framed[key],
        )
        for key, (width, _) in sizes.items()
    }
    spine = _spine(rows, chains)
    order = _ordered(rows, chains, spine)
    xs = _places(order, chains, extents, spine)
    boxes: dict[str, Box] = {}
    y = 0.0
    tops: dict[str, tuple[float, float]] = {}
    for row, following in zip(order, [*order[1:], []], strict=True):
        tall = max(_tall(key, sizes, leaves) for key in row)
        for key in row:
            tops[key] = (y, y + tall)
            if key in sizes:
                boxes[key] = Box(xs[key], y + tall / 2, *sizes[key])
                _place_leaves(key, boxes, sizes, leaves)
        inside, below = (
            {diagram.nodes[k].frame for k in r if k in sizes} for r in (row, following)
        )
        y += tall + (_GAP_Y if inside == below else _GAP_FRAMES)
    routes = [
        _down(boxes[e.source], boxes[e.target], chain[1:-1], xs, tops)
        if e.source not in leaves.get(e.target, ())
        else _across(boxes[e.source], boxes[e.target])
        for e, chain in zip(diagram.edges, chains, strict=True)
    ]
    return Layout(boxes, routes)


def _size(node: Node) -> tuple[float, float]:
    text = max(len(line) * FONT for line in lines(node))
    wide = max(text, len(node.detail) * SMALL) * CHAR
    return wide + 2 * _PAD, LINE * (len(lines(node)) + bool(node.detail)) + _PAD


def _leaves(diagram: Diagram) -> dict[str, list[str]]:
    """The parameters that each node reads, by node key."""
    found: dict[str, list[str]] = {}
    for e in diagram.edges:
        if diagram.nodes[e.source].kind == "param":
            found.setdefault(e.target, []).append(e.source)
    return found


def _rows(
    diagram: Diagram, leaves: Mapping[str, Sequence[str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """The rows, and each arrow as a chain of keys, with one key for each row that it passes."""
    hung = {leaf for stack in leaves.values() for leaf in stack}
    above: dict[str, list[str]] = {key: [] for key in diagram.nodes if key not in hung}
    below: dict[str, list[str]] = {key: [] for key in above}
    for e in diagram.edges:
        if e.source not in hung:
            above[e.target].append(e.source)
            below[e.source].append(e.target)
    rank: dict[str, int] = {}
    todo = list(above)
    while todo:
        key = todo.pop()
        missing = [k for k in above[key] if k not in rank]
        if missing:
            todo += [key, *missing]
        else:
            rank[key] = max((rank[k] + 1 for k in above[key]), default=0)
    for key in above:  # an input goes right above its first reader
        if not above[key] and below[key]:
            rank[key] = max(0, min(rank[k] for k in below[key]) - 1)
    rows: list[list[str]] = [[] for _ in range(max(rank.values(), default=0) + 1)]
    for key, r in rank.items():
        rows[r].append(key)
    chains = []
    for i, e in enumerate(diagram.edges):
        if e.source in hung:
            chains.append([])
            continue
        between = [f"{i}:{r}" for r in range(rank[e.source] + 1, rank[e.target])]
        for r, key in enumerate(between, rank[e.source] + 1):
            rows[r].append(key)
        chains.append([e.source, *between, e.target])
    return rows, chains


def _neighbours(chains: Sequence[Sequence[str]]) -> tuple[dict[str, list[str]], ...]:
    up: dict[str, list[str]] = {}
    down: dict[str, list[str]] = {}
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            down.setdefault(a, []).append(b)
            up.setdefault(b, []).append(a)
    return up, down


def _spine(rows: Sequence[Sequence[str]], chains: Sequence[Sequence[str]]) -> set[str]:
    """The nodes of a longest path of arrows between adjacent rows."""
    up, _ = _neighbours([chain for chain in chains if len(chain) == 2])
    length: dict[str, int] = {}
    for row in rows:
        for key in row:
            length[key] = 1 + max((length[k] for k in up.get(key, ())), default=0)
    key = max(length, key=lambda k: length[k], default=None)
    found = set()
    while key is not None:
        found.add(key)
        key = max(up.get(key, ()), key=lambda k: length[k], default=None)
    return found


def _ordered(
    rows: list[list[str]], chains: Sequence[Sequence[str]], spine: set[str]
) -> list[list[str]]:
    up, down = _neighbours(chains)
    at = {key: float(i) for row in rows for i, key in enumerate(row)}
    for sweep in range(12):
        forward = sweep % 2 == 0
        near = up if forward else down
        for row in rows if forward else reversed(rows):
            row.sort(key=lambda k: (k not in spine, _mean([at[n] for n in near.get(k, ())], at[k])))
            at.update({key: float(i) for i, key in enumerate(row)})
    return rows


def _places(
    rows: Sequence[Sequence[str]],
    chains: Sequence[Sequence[str]],
    extents: Mapping[str, tuple[float, float]],
    spine: set[str],
) -> dict[str, float]:
    """Horizontal positions: close to neighbours, no overlap within a row, a straight spine."""
    up, down = _neighbours(chains)
    xs = {key: 0.0 for row in rows for key in row}
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            near = [[*up.get(k, ()), *down.get(k, ())] for k in row]
            wanted = [
                0.0 if k in spine else _mean([xs[n] for n in ns], xs[k])
                for k, ns in zip(row, near, strict=True)
            ]
            # A box pulls harder than an arrow that passes.
            weights = [1e6 if k in spine else 4.0 if k in extents else 1.0 for k in row]
            gaps = [
                extents.get(a, (0, 6))[1] + extents.get(b, (6, 0))[0] + _GAP_X
                for a, b in itertools.pairwise(row)
            ]
            xs.update(zip(row, _apart(wanted, gaps, weights), strict=True))
    row_of = {key: row for row in rows for key in row}
    for chain in chains:
        _straighten(chain[1:-1], row_of, extents, xs)
    return xs


def _straighten(
    between: Sequence[str],
    row_of: Mapping[str, Sequence[str]],
    extents: Mapping[str, tuple[float, float]],
    xs: dict[str, float],
) -> None:
    """Moves a passing arrow to its outermost position in every row, if nothing is in the way."""
    out = max((xs[key] for key in between), default=0.0)
    for key in between:
        right = [k for k in row_of[key] if xs[k] > xs[key]]
        if any(xs[k] - extents.get(k, (0, 0))[0] < out + 12 for k in right):
            return
    xs.update(dict.fromkeys(between, out))


def _apart(wanted: list[float], gaps: list[float], weights: list[float]) -> list[float]:
    """The positions nearest to those wanted that keep the gaps: pool adjacent violators."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # mean, weight, count
    for w, o, weight in zip(wanted, offsets, weights, strict=True):
        pools.append((w - o, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    flat = [mean for mean, _, n in pools for _ in range(n)]
    return [f + o for f, o in zip(flat, offsets, strict=True)]


def _tall(key: str, sizes: Mapping, leaves: Mapping[str, Sequence[str]]) -> float:
    stack = [sizes[leaf][1] + 8 for leaf in leaves.get(key, ())]
    return max(sizes[key][1] if key in sizes else 0, sum(stack) - 8)


def _place_leaves(key: str, boxes: dict[str, Box], sizes: Mapping, leaves: Mapping) -> None:
    box = boxes[key]
    stack = leaves.get(key, ())
    y = box.y - sum(sizes[leaf][1] + 8 for leaf in stack) / 2 + 4
    for leaf in stack:
        width, height = sizes[leaf]
        x = box.x - box.width / 2 - _LEAF_GAP - width / 2
        boxes[leaf] = Box(x, y + height / 2, width, height)
        y += height + 8


def _across(a: Box, b: Box) -> Route:
    reach = max(b.height / 2 - 7, 0)
    y = b.y + min(max(a.y - b.y, -reach), reach)
    return Route([(a.x + a.width / 2, a.y), (b.x - b.width / 2, y)], sideways=True)


def _down(
    a: Box,
    b: Box,
    between: Sequence[str],
    xs: Mapping[str, float],
    tops: Mapping[str, tuple[float, float]],
) -> Route:
    points = [(a.x, a.y + a.height / 2)]
    for key in between:
        points += [(xs[key], tops[key][0]), (xs[key], tops[key][1])]
    return Route([*points, (b.x, b.y - b.height / 2)])


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
