"""Draws a function: its dependencies, what is trained, and where staging cuts.

PyTorch users draw `grad_fn` to see the operations behind a loss. A jaxpr shows more: frozen
parameters, the data, modules, and the value that `jaxgrad.stage` stores where the frozen part ends.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.extend import core as jex

from jaxgrad._drawing.diagram import diagram
from jaxgrad._drawing.groups import Inputs
from jaxgrad._drawing.layered import layout
from jaxgrad._drawing.nodes import Diagram, Node
from jaxgrad._drawing.svg import svg
from jaxgrad._jaxpr.dataflow import depending, reads
from jaxgrad._jaxpr.graph import trace
from jaxgrad._staging.split import split
from jaxgrad._staging.traced_loss import TracedLoss
from jaxgrad._tree.flat import PyTree, flatten, is_array
from jaxgrad._tree.select import select
from jaxgrad._tree.selection import Selection
from jaxgrad._tree.wrt import Wrt

_MANY = 60  # a picture of more equations is hard to read


@dataclasses.dataclass(frozen=True, repr=False)
class Picture:
    """A drawing of a function, returned by `jaxgrad.graph`. Notebooks display it.

    Attributes:
        diagram: its nodes and edges.
        notes: the legend's text for each colour.
    """

    diagram: Diagram
    notes: dict[str, str]

    def __repr__(self) -> str:
        nodes, edges = len(self.diagram.nodes), len(self.diagram.edges)
        return f"<Picture of {nodes} nodes and {edges} edges; .save('graph.svg') writes it>"

    def _repr_svg_(self) -> str:
        return self.svg()

    def svg(self) -> str:
        """Returns the drawing as SVG, in light or dark colours to match the reader's system."""
        return svg(self.diagram, layout(self.diagram), self.notes)

    def dot(self) -> str:
        """Returns the graph in Graphviz's DOT language."""
        nodes = [
            f'  "{key}" [label="{_quoted(_text(n))}"{_DOT.get(n.state, "")}];'
            for key, n in self.diagram.nodes.items()
        ]
        edges = [
            f'  "{e.source}" -> "{e.target}" [label="{e.label}"{_DOT_STAGED * e.staged}];'
            for e in self.diagram.edges
        ]
        head = 'digraph {\n  node [shape=box, fontname="monospace"];'
        return "\n".join([head, *nodes, *edges, "}\n"])

    def mermaid(self) -> str:
        """Returns the graph as Mermaid text, which GitHub renders in Markdown."""
        names = {key: f"n{i}" for i, key in enumerate(self.diagram.nodes)}
        nodes = [
            f'  {names[key]}["{_quoted(_text(n), "<br>", "#quot;")}"]'
            + f":::{n.state}" * bool(n.state)
            for key, n in self.diagram.nodes.items()
        ]
        edges = [
            f"  {names[e.source]} {'-.->' if e.staged else '-->'}"
            + f'|"{e.label}"|' * bool(e.label)
            + f" {names[e.target]}"
            for e in self.diagram.edges
        ]
        return "\n".join(["flowchart TD", *nodes, *edges, *_MERMAID, ""])

    def png(self, scale: float = 2.0) -> bytes:
        """Returns the drawing as PNG bytes, in light colours.

        Args:
            scale: pixels per SVG unit.

        Raises:
            ModuleNotFoundError: the extra `graph` is not installed.
        """
        try:
            import matplotlib
            import resvg_py
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError(
                f"a PNG needs '{e.name}': pip install 'jaxgrad[graph]'; .svg, .dot and .mmd need "
                "no extra."
            ) from e
        # matplotlib's own font: its widths are known, and a machine may have no fonts.
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        files = [str(folder / f"DejaVuSansMono{weight}.ttf") for weight in ("", "-Bold")]
        return bytes(
            resvg_py.svg_to_bytes(
                svg_string=self.svg().replace("ui-monospace, ", "'DejaVu Sans Mono', "),
                zoom=scale,
                font_files=files,
                skip_system_fonts=True,
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture to a file, in the format given by its suffix.

        Args:
            path: `.svg`, `.png`, `.dot` (Graphviz) or `.mmd` (Mermaid).

        Raises:
            ValueError: the file has another suffix.
            ModuleNotFoundError: `.png` without the extra `graph`.
        """
        path = Path(path)
        formats: dict[str, Callable[[], str | bytes]] = {
            ".svg": self.svg,
            ".png": self.png,
            ".dot": self.dot,
            ".mmd": self.mermaid,
        }
        if path.suffix not in formats:
            raise ValueError(
                f"'{path}' ends in '{path.suffix}'; a picture is saved as {', '.join(formats)}."
            )
        made = formats[path.suffix]()
        path.write_bytes(made if isinstance(made, bytes) else made.encode())


def graph(
    fun: Callable[..., Any],
    params: PyTree,
    *args: PyTree,
    wrt: Wrt | None = None,
    depth: int | None = None,
) -> Picture:
    """Draws a function: its parameters, its operations or modules, and which of them are trained.

    Args:
        fun: a function that JAX can trace, `fun(params, *args)`.
        params: any pytree: arrays, or `jax.ShapeDtypeStruct`.
        *args: its other arguments, trees of arrays or of `jax.ShapeDtypeStruct`. If the first is a
            batch with its examples along axis 0, the picture marks the value that `jaxgrad.stage`
            would store.
        wrt: the leaves that are trained; see `select`. Without it, nothing is highlighted.
        depth: draws each module to this depth as one box, and consecutive modules that do the same
            as one box with a count; 0 draws operations. By default, 0 for up to 60 operations,
            else 1.

    Returns:
        The picture. `.save("graph.svg")` writes it; other suffixes are `.png`, `.dot` and `.mmd`.

    Raises:
        SelectionError: `wrt` does not fit `params`.
        ValueError: `depth` is negative.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["trunk"]) @ params["head"])
        >>> params = {"head": jnp.ones(4), "trunk": jnp.ones((100, 4))}
        >>> picture = jg.graph(loss, params, jnp.ones((5, 100)), wrt="head")
        >>> [node.label for node in picture.diagram.nodes.values() if node.state == "trained"]
        ['dot_general', 'reduce_sum', 'head']
        >>> "stored once: 5 × 4" in picture.svg()
        True

    Source: `torchviz.make_dot`; Sugiyama, Tagawa and Toda, "Methods for visual understanding of
    hierarchical system structures", 1981, for the layout.
    """
    if depth is not None and depth < 0:
        raise ValueError(
            f"depth={depth} is negative; pass 0 to draw operations, 1 or more for modules."
        )
    selection = None if wrt is None else select(params, wrt)
    traced = trace(fun, params, *args)
    flat = flatten(params) if selection is None else selection.named(params)
    paths = [p for p, leaf in zip(flat.paths, flat.leaves, strict=True) if is_array(leaf)]
    marks = [False] * len(flat.leaves) if selection is None else selection.flags
    chosen = [c for c, leaf in zip(marks, flat.leaves, strict=True) if is_array(leaf)]
    given = sum(name.startswith("closed over/") for name in traced.inputs)
    invars = traced.jaxpr.invars
    params_vars = invars[given : given + len(paths)]
    data = dict(zip(invars[given + len(paths) :], traced.inputs[given + len(paths) :], strict=True))
    named = dict(zip(params_vars, (p or "params" for p in paths), strict=True))
    trained = frozenset(v for v, c in zip(params_vars, chosen, strict=True) if c)
    staged = frozenset()
    if selection is not None:
        staged = _staged(fun, params, args, selection, traced.jaxpr, trained)
    inputs = Inputs(named, data, None if selection is None else trained, staged)
    if depth is None:
        depth = 0 if len(traced.equations) <= _MANY else 1
    drawn = diagram(traced.jaxpr, inputs, depth)
    return Picture(drawn, _notes(drawn))


def _staged(
    fun: Callable[..., Any],
    params: PyTree,
    args: tuple[PyTree, ...],
    selection: Selection,
    jaxpr: jex.Jaxpr,
    trained: frozenset[jex.Var],
) -> frozenset[jex.Var]:
    """The values that `stage` would store, found in another trace of the same function.

    Both traces inline the frozen part alike, so their frozen equations pair up one by one.
    """
    sizes = {x.shape[:1] for x in jax.tree.leaves(jax.eval_shape(lambda *a: a, *args[:1]))}
    if len(sizes) != 1 or sizes < {(), (0,), (1,)}:
        return frozenset()  # no batch, or too few examples to tell the batch axis
    ((rows,),) = sizes
    source = TracedLoss(fun, selection.named(params), selection.flags, args[0], args[1:])
    cut = split(source, rows)
    moving = cut.program.depending([*cut.program.trainable, *cut.program.vary])
    theirs = [e for e in cut.program.jaxpr.eqns if moving.isdisjoint(e.outvars)]
    depends = depending(jaxpr.eqns, trained)
    ours = [e for e in jaxpr.eqns if not reads(e, depends)]
    if [e.primitive for e in ours] != [e.primitive for e in theirs]:
        return frozenset()
    pairs = {
        b: a
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.outvars, y.outvars, strict=True)
    }
    return frozenset(pairs[v] for v in cut.computed if v in pairs)


def _notes(drawn: Diagram) -> dict[str, str]:
    nodes = drawn.nodes.values()
    notes = {
        "trained": ("gradient flows", any(n.state == "trained" for n in nodes)),
        "frozen": ("frozen", any(n.state == "frozen" for n in nodes)),
        "staged": ("stored once, by staging", any(e.staged for e in drawn.edges)),
        "data": ("data", any(n.kind == "input" for n in nodes)),
    }
    return {kind: note for kind, (note, there) in notes.items() if there}


_DOT = {
    "trained": ', style=filled, fillcolor="#fff0dd", color="#d97f1e"',
    "frozen": ', style=filled, fillcolor="#eef0f3", color="#b4bac5"',
}
_MERMAID = (
    "  classDef trained fill:#fff0dd,stroke:#d97f1e,color:#7c3f00",
    "  classDef frozen fill:#eef0f3,stroke:#b4bac5,color:#5b6370",
)
_DOT_STAGED = ', style=dashed, color="#0f8577", penwidth=2'


def _text(node: Node) -> str:
    return f"{node.label}\n{node.detail}" if node.detail else node.label


def _quoted(text: str, newline: str = "\\n", quote: str = '\\"') -> str:
    return text.replace('"', quote).replace("\n", newline)
