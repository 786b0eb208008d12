"""The nodes and edges of a diagram."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Node:
    """One box.

    Attributes:
        key: identifies the node in edges.
        kind: "param", "input", "op", "call" (a library function), "module" or "output".
        label: the text in the box.
        detail: the smaller line below it.
        state: "trained", "frozen", or "" for neither.
        module: the module that an operation or a parameter belongs to, or "".
        frame: the frame around the node, or ""; each call of a module has its own.
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
        source: the node that computes it.
        target: the node that reads it.
        label: its shape.
        trained: whether it depends on trained parameters.
        staged: whether staging stores it.
    """

    source: str
    target: str
    label: str
    trained: bool
    staged: bool


@dataclasses.dataclass(frozen=True)
class Diagram:
    """The nodes by key, and the edges."""

    nodes: dict[str, Node]
    edges: list[Edge]
