"""Writes a laid-out diagram as SVG: few colours, one font, a legend of the colours that occur.

All text is monospaced, so its width is known without measuring and it overlaps in no viewer. The
drawing has its own background, so that it reads on every page, and a second set of colours for
readers whose system is dark.
"""

import html
from collections.abc import Iterator, Mapping

from jaxgrad._drawing.layered import CHAR, FONT, FRAME, LINE, SMALL, Box, Layout, Route, lines
from jaxgrad._drawing.nodes import Diagram, Edge, Node

_FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_MARGIN, _LEGEND = 26, 34

# For each class: fill, line, text.
_LIGHT = {
    "ground": ("#ffffff", "#d9dde4", "#20242c"),
    "plain": ("#ffffff", "#98a1b0", "#20242c"),
    "data": ("#e9f2fc", "#5c8dc6", "#1d4a7d"),
    "trained": ("#fff0dd", "#d97f1e", "#7c3f00"),
    "frozen": ("#eef0f3", "#b4bac5", "#5b6370"),
    "staged": ("#dcf3ef", "#0f8577", "#0b5d53"),
    "group": ("none", "#cfd4dc", "#7a8290"),
}
_DARK = {
    "ground": ("#16181d", "#2d323b", "#e4e7ec"),
    "plain": ("#1e2128", "#6d7686", "#e4e7ec"),
    "data": ("#15283d", "#5c8dc6", "#a9cdf5"),
    "trained": ("#3b2710", "#e8973f", "#ffd3a1"),
    "frozen": ("#24282f", "#4e5663", "#a3abb8"),
    "staged": ("#0e3430", "#2fb5a4", "#8fe3d8"),
    "group": ("none", "#3a404b", "#8a93a2"),
}


def svg(diagram: Diagram, placed: Layout, notes: Mapping[str, str]) -> str:
    """Returns the drawing.

    Args:
        diagram: the nodes and edges.
        placed: their positions.
        notes: the legend's text for each class that occurs.
    """
    frames = _frames(diagram, placed)
    titles = {node.frame: node.module for node in diagram.nodes.values()}
    rects = [*placed.boxes.values(), *frames.values()]
    points = [p for route in placed.routes for p in route.points]
    xs = [x for b in rects for x in (b.x - b.width / 2, b.x + b.width / 2)] + [p[0] for p in points]
    ys = [y for b in rects for y in (b.y - b.height / 2, b.y + b.height / 2)]
    labels = list(_labels(diagram, placed, frames))
    xs += [
        x + len(text) * SMALL * CHAR * (1 if side == "start" else -1)
        for _, text, x, _, side in labels
    ]
    legend, legend_width = _legend(notes)
    x0, y0 = min(xs) - _MARGIN, min(ys) - _MARGIN
    width = max(max(xs) - x0 + _MARGIN, legend_width + 2 * _MARGIN)
    x0 -= (width - (max(xs) - x0 + _MARGIN)) / 2
    height = max(ys) - y0 + _MARGIN + (_LEGEND if notes else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="jaxgrad" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="{x0:.1f} {y0:.1f} {width:.1f} {height:.1f}" '
        f'font-family="{_FONT}">',
        f"<style>{_style()}</style>",
        f'<rect class="jg-ground" x="{x0 + 0.5:.1f}" y="{y0 + 0.5:.1f}" width="{width - 1:.1f}" '
        f'height="{height - 1:.1f}" rx="10" {_paint("ground")}/>',
        *(_frame(titles[frame], box) for frame, box in frames.items()),
        *(_arrow(e, r) for e, r in zip(diagram.edges, placed.routes, strict=True)),
        *(_node(node, placed.boxes[key]) for key, node in diagram.nodes.items()),
        *(_text(text, x, y, SMALL, kind, side, halo=True) for kind, text, x, y, side in labels),
        f'<g transform="translate({x0 + _MARGIN:.1f} {y0 + height - _LEGEND + 6:.1f})">'
        f"{''.join(legend)}</g>",
        "</svg>",
    ]
    return "\n".join(parts)


def _style() -> str:
    """Dark colours. The light ones are attributes, which viewers without CSS read too."""
    rules = []
    for name, (fill, line, text) in _DARK.items():
        rules.append(f".jaxgrad .jg-{name}{{fill:{fill};stroke:{line}}}")
        rules.append(f".jaxgrad .jg-{name}-line{{stroke:{line}}}")
        rules.append(f".jaxgrad .jg-{name}-head{{fill:{line}}}")
        rules.append(f".jaxgrad .jg-{name}-text{{fill:{text}}}")
    rules.append(f".jaxgrad .jg-halo{{stroke:{_DARK['ground'][0]}}}")
    return f"@media (prefers-color-scheme: dark){{{''.join(rules)}}}"


def _paint(kind: str, width: float = 1.2) -> str:
    fill, line, _ = _LIGHT[kind]
    return f'fill="{fill}" stroke="{line}" stroke-width="{width}"'


def _kind(node: Node) -> str:
    return "data" if node.kind == "input" else node.state or "plain"


def _node(node: Node, box: Box) -> str:
    kind = _kind(node)
    radius = {"param": box.height / 2, "input": box.height / 2, "output": box.height / 2}
    x, y = box.x - box.width / 2, box.y - box.height / 2
    shown = lines(node)
    tall = LINE * (len(shown) + bool(node.detail))
    texts, at = [], box.y - tall / 2 + LINE / 2
    for i, line in enumerate(shown):
        texts.append(_text(line, box.x, at + i * LINE, FONT, kind, bold=node.kind == "module"))
    if node.detail:
        texts.append(_text(node.detail, box.x, at + len(shown) * LINE, SMALL, kind))
    dash = ' stroke-dasharray="5 3"' if node.kind == "call" else ""
    return (
        f'<rect class="jg-{kind}" x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{min(radius.get(node.kind, 5), 16):.1f}" '
        f"{_paint(kind)}{dash}/>{''.join(texts)}"
    )


def _text(
    text: str,
    x: float,
    y: float,
    font: float,
    kind: str,
    anchor: str = "middle",
    *,
    bold: bool = False,
    halo: bool = False,
) -> str:
    style = ' font-weight="600"' * bold
    common = (
        f'x="{x:.1f}" y="{y + font * 0.35:.1f}" font-size="{font}" text-anchor="{anchor}"{style}'
    )
    under = ""
    if halo:  # a second text below: not every viewer supports paint-order
        under = (
            f'<text class="jg-halo" {common} fill="none" stroke="{_LIGHT["ground"][0]}" '
            f'stroke-width="4" stroke-linejoin="round">{html.escape(text)}</text>'
        )
    colour = _LIGHT[kind][2]
    return (
        f'{under}<text class="jg-{kind}-text" {common} fill="{colour}">{html.escape(text)}</text>'
    )


def _edge_kind(edge: Edge) -> str:
    return "staged" if edge.staged else "trained" if edge.trained else "plain"


def _arrow(edge: Edge, route: Route) -> str:
    kind = _edge_kind(edge)
    colour = _LIGHT[kind][1]
    x, y = route.points[-1]
    end = (x - 6, y) if route.sideways else (x, y - 6)
    at = route.points[0]
    path = [f"M {at[0]:.1f} {at[1]:.1f}"]
    for stop in [*route.points[1:-1], end]:
        if route.sideways:
            middle = (at[0] + stop[0]) / 2
            bends = f"{middle:.1f} {at[1]:.1f} {middle:.1f} {stop[1]:.1f}"
        else:
            middle = (at[1] + stop[1]) / 2
            bends = f"{at[0]:.1f} {middle:.1f} {stop[0]:.1f} {middle:.1f}"
        path.append(f"C {bends} {stop[0]:.1f} {stop[1]:.1f}")
        at = stop
    width = {"staged": 2.6, "trained": 1.8}.get(kind, 1.2)
    sides = (-3.5, 3.5)
    wings = [(x - 7, y + s) if route.sideways else (x + s, y - 7) for s in sides]
    head = " ".join(f"{a:.1f},{b:.1f}" for a, b in [(x, y), *wings])
    dash = ' stroke-dasharray="7 4"' if edge.staged else ""
    return (
        f'<path class="jg-{kind}-line" d="{" ".join(path)}" fill="none" stroke="{colour}" '
        f'stroke-width="{width}"{dash}/><polygon class="jg-{kind}-head" points="{head}" '
        f'fill="{colour}"/>'
    )


def _labels(
    diagram: Diagram, placed: Layout, frames: Mapping[str, Box]
) -> Iterator[tuple[str, str, float, float, str]]:
    """A label for the value that leaves a box, on the side of the arrow without detours."""
    first: dict[str, tuple[Edge, Route]] = {}
    for edge, route in zip(diagram.edges, placed.routes, strict=True):
        if edge.label and (edge.source not in first or edge.staged):
            first[edge.source] = edge, route
    for edge, route in first.values():
        x, y = route.points[0]
        text = f"stored once: {edge.label}" if edge.staged else edge.label
        frame = frames.get(diagram.nodes[edge.source].frame)
        if frame and diagram.nodes[edge.target].frame != diagram.nodes[edge.source].frame:
            y = frame.y + frame.height / 2  # below the frame's line
        kind, right = "staged" if edge.staged else "group", x > 1
        yield kind, text, x + 9 if right else x - 9, y + 14, "start" if right else "end"


def _frames(diagram: Diagram, placed: Layout) -> dict[str, Box]:
    """A frame around the operations of each module, unless another box would be inside it."""
    members: dict[str, list[str]] = {}
    for key, node in diagram.nodes.items():
        if node.frame:
            members.setdefault(node.frame, []).append(key)
    found = {}
    for frame, keys in members.items():
        name, boxes = diagram.nodes[keys[0]].module, [placed.boxes[k] for k in keys]
        left = min(b.x - b.width / 2 for b in boxes) - FRAME[0]
        right = max(b.x + b.width / 2 for b in boxes) + FRAME[2]
        top = min(b.y - b.height / 2 for b in boxes) - FRAME[1]
        bottom = max(b.y + b.height / 2 for b in boxes) + FRAME[3]
        others = (b for k, b in placed.boxes.items() if k not in keys)
        if any(_meets(b, left, right, top, bottom) for b in others):
            continue
        right = max(right, left + (len(name) + 2) * SMALL * CHAR + 12)
        found[frame] = Box((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    return found


def _meets(box: Box, left: float, right: float, top: float, bottom: float) -> bool:
    across = box.x + box.width / 2 > left and box.x - box.width / 2 < right
    return across and box.y + box.height / 2 > top and box.y - box.height / 2 < bottom


def _frame(name: str, box: Box) -> str:
    x, y = box.x - box.width / 2, box.y - box.height / 2
    return (
        f'<rect class="jg-group" x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="8" {_paint("group", 1)}/>'
        + _text(name, x + 9, y + 10, SMALL, "group", "start", bold=True)
    )


def _legend(notes: Mapping[str, str]) -> tuple[list[str], float]:
    parts, x = [], 0.0
    for kind, note in notes.items():
        parts.append(
            f'<rect class="jg-{kind}" x="{x:.1f}" y="2" width="14" height="12" rx="3" '
            f"{_paint(kind)}/>" + _text(note, x + 20, 8, SMALL, "ground", "start")
        )
        x += 20 + len(note) * SMALL * CHAR + 22
    return parts, max(0.0, x - 22)
