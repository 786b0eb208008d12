"""Extracts named tensors, scalars and module trees from an object graph.

A pickled `torch.nn.Module` is its `__dict__`: walking `_parameters`, `_buffers` (without the
non-persistent ones) and `_modules` gives the names and values of its `state_dict()`. Nested dicts
and sequences give dotted names in the same way. The graph may share parts, so the number of names
can be exponential in its size, and it may contain itself. So depth and names are limited.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad.torch._reading.tensors import Tensor
from jaxgrad.torch._reading.torch_globals import Unreadable
from jaxgrad.torch._reading.unpickler import Global, Object

T = TypeVar("T")

MAX_DEPTH = 128
# The limit of a walk, in characters of names plus a weight per visit. It allows about 10 s, and a
# tree of 200,000 modules.
MAX_NAMES_COST = 1 << 27
MAX_CONFIG_LENGTH = 64
MAX_NAMED_ELEMENTS = 1024
_NODE_COST, _MODULE_COST, _ENTRY_COST = 64, 256, 8
_SCALARS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Module:
    """The structure of a pickled `torch.nn.Module`: classes and configurations, no code.

    Attributes:
        cls: the class, by its import path: "torch.nn.modules.linear.Linear", "__main__.Net".
        config: its public attributes that are scalars or flat tuples of scalars: `in_features`,
            `kernel_size`, `p`, `eps`. A function (`torch.nn.functional.relu`) appears as its name.
        children: its submodules by name, in registration order.
        parameters: the names of its own parameters, in order, without those that are None.
        buffers: the names of its own persistent buffers, likewise.

    Example:
        >>> relu = Module("torch.nn.modules.activation.ReLU", {"inplace": False})
        >>> Module("__main__.Net", {}, {"act": relu})
        Net(
          (act): ReLU(inplace=False)
        )
    """

    cls: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    children: Mapping[str, "Module"] = dataclasses.field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = {key: value for key, value in self.config.items() if key != "training"}
        config = ", ".join(f"{key}={value!r}" for key, value in shown.items())
        head = f"{self.cls.rpartition('.')[2]}({config}"
        if not self.children:
            return f"{head})"
        lines = [f"({name}): {child!r}" for name, child in self.children.items()]
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{head}\n  {body}\n)"


@dataclasses.dataclass(slots=True)
class Contents:
    """What a walk has found, by dotted name."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)
    modules: dict[str, Module] = dataclasses.field(default_factory=dict)
    _left: int = dataclasses.field(default_factory=lambda: MAX_NAMES_COST)
    _names: set[str] = dataclasses.field(default_factory=set)

    def enter(self, name: str, depth: int, cost: int = _NODE_COST) -> None:
        """Counts a visit of `name` against the limits."""
        if depth > MAX_DEPTH:
            reason = f"nested deeper than {MAX_DEPTH} levels, or inside itself"
            raise MalformedError(reason, _shown(name))
        self._left -= len(name) + cost
        if self._left < 0:
            raise MalformedError("too many names (parts may be shared)", _shown(name))

    def add(self, kind: dict[str, T], name: str, value: T) -> None:
        """Adds a leaf under a new name."""
        if name in self._names:
            raise MalformedError("two entries have this name", _shown(name))
        self._names.add(name)
        kind[name] = value


def _shown(name: str) -> str:
    return shorten(name) or "the saved object"


def contents(root: object) -> Contents:
    """Everything readable in an unpickled object graph."""
    found = Contents()
    _visit(found, "", root, 0)
    return found


def _join(prefix: str, key: object) -> str:
    key = key.name if isinstance(key, Global) else key
    return f"{prefix}.{key}" if prefix else str(key)


def _visit(found: Contents, name: str, node: object, depth: int) -> None:
    found.enter(name, depth)
    if isinstance(node, Tensor):
        found.add(found.tensors, name, node)
    elif node is None or isinstance(node, _SCALARS):
        found.add(found.values, name, node)
    elif _is_long_plain(node):
        found.enter(name, depth, _ENTRY_COST * len(node))
        found.add(found.values, name, tuple(node))
    elif isinstance(node, Unreadable):
        raise MalformedError(node.reason, _shown(name))
    elif isinstance(node, Object) and _is_module(node.state):
        found.modules[name] = _visit_module(found, name, node, depth)
    else:
        children = _children(node)
        if children is None:
            kind = node.cls if isinstance(node, Object) else getattr(node, "name", None)
            found.add(found.opaque, name, kind or type(node).__name__)
            return
        for key, child in children:
            _visit(found, _join(name, key), child, depth + 1)


def _is_long_plain(node: object) -> TypeGuard[Sequence[object]]:
    """Whether a sequence (a history of losses, say) is better kept as one value than as many."""
    return (
        isinstance(node, (list, tuple))
        and len(node) > MAX_NAMED_ELEMENTS
        and all(element is None or isinstance(element, _SCALARS) for element in node)
    )


def _children(node: object) -> Iterable[tuple[Any, Any]] | None:
    """A container's keys and elements; None for anything else."""
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    if isinstance(node, Object):
        if node.items is not None:
            return node.items.items()
        if node.cls in ("argparse.Namespace", "types.SimpleNamespace"):
            return node.state.items() if isinstance(node.state, dict) else None
    return None


def _is_module(state: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(state, dict) and all(
        isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules")
    )


def _visit_module(found: Contents, name: str, node: Object, depth: int) -> Module:
    state = node.state
    groups = (state["_parameters"], state["_buffers"], state["_modules"])
    size = len(state) + sum(len(group) for group in groups)
    found.enter(name, depth, _MODULE_COST + _ENTRY_COST * size)
    unsaved = state.get("_non_persistent_buffers_set")
    unsaved = unsaved if isinstance(unsaved, (set, frozenset)) else ()
    buffers = {key: value for key, value in state["_buffers"].items() if key not in unsaved}
    own = []
    for group in (state["_parameters"], buffers):
        present = {key: value for key, value in group.items() if value is not None}
        for key, value in present.items():
            full = _join(name, key)
            found.enter(full, depth)
            if isinstance(value, Unreadable):
                raise MalformedError(value.reason, _shown(full))
            if not isinstance(value, Tensor):
                kind = value.cls if isinstance(value, Object) else type(value).__name__
                raise MalformedError(
                    f"is a {shorten(kind)}, not a tensor with values", _shown(full)
                )
            found.add(found.tensors, full, value)
        own.append(tuple(str(key) for key in present))
    children = {}
    for key, child in state["_modules"].items():
        if child is None:
            continue
        full = _join(name, key)
        if not isinstance(child, Object) or not _is_module(child.state):
            kind = child.cls if isinstance(child, Object) else type(child).__name__
            raise MalformedError(f"is a {shorten(kind)}, not a module of plain state", _shown(full))
        children[str(key)] = _visit_module(found, full, child, depth + 1)
    return Module(node.cls, _config(state), children, *own)


def _config(state: Mapping[Any, Any]) -> dict[str, Any]:
    config = {}
    for key, value in state.items():
        if not isinstance(key, str) or key.startswith("_"):
            continue
        if isinstance(value, (tuple, list)) and len(value) <= MAX_CONFIG_LENGTH:
            plain = tuple(_plain(element) for element in value)
            if _opaque not in plain:
                config[key] = plain
        elif (plain := _plain(value)) is not _opaque:
            config[key] = plain
    return config


_opaque = object()


def _plain(value: object) -> object:
    if isinstance(value, Global):
        return value.name
    return value if value is None or isinstance(value, _SCALARS) else _opaque
