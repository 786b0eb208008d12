"""Accounts for every tensor and every leaf: with an entry, a reason, or a problem.

Problems are collected and raised together: one rule often fixes many of them.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxgrad._text import listed, nearest
from jaxgrad.torch._mapping import resolve
from jaxgrad.torch._mapping.flax_layers import Layer, Leaf, Tree
from jaxgrad.torch._mapping.layouts import Part
from jaxgrad.torch._mapping.pairing import Match
from jaxgrad.torch._mapping.report import Entry, Pair, Problem, Report, fault
from jaxgrad.torch._mapping.rules import Group, describe
from jaxgrad.torch._mapping.source import File

_MOST_COMPARED = 30_000
_NOT_SELECTED = "not selected"


@dataclasses.dataclass
class Ledger:
    """A mapping under construction: what is settled so far, and the problems."""

    file: File
    tree: Tree
    selected: set[str]
    dropped: dict[str, str]
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    compared: int = 0

    def loads(self, layer: Layer) -> bool:
        """Whether any leaf of the layer is selected."""
        return any(leaf.path in self.selected for leaf in layer.leaves.values())

    def settle(self, matches: Sequence[Match]) -> None:
        """Decides the layout of each pair, and checks the selected leaves.

        A layer that is not selected raises no problem. It still counts as evidence for a flatten,
        and if its layout is certain, its names are kept for writing the file back.
        """
        shapes = {name: x.shape for name, x in self.file.tensors.items()}
        place = {name: i for i, name in enumerate(shapes)}
        matches = sorted(matches, key=lambda m: min(place[n] for n in m.group.tensors.values()))
        typed: list[Match] = []
        for m in matches:
            found = resolve.typed(m, self.file.kind(m.group), shapes)
            if isinstance(found, Layer):
                typed.append(m._replace(layer=found))
            elif self.loads(m.layer):
                self.problems.append(found)
            else:
                typed.append(m)
        channels, undeclared = resolve.channels(typed, self.tree)
        for layer, group, why in typed:
            parts = layer.parts(
                channels=channels.get(layer.path, 1), separate="q_proj_weight" in group.tensors
            )
            if not layer.kind.endswith("?") and layer.path not in undeclared:
                self.pairs.append(Pair(layer, parts, group.tensors, why))
            if not self.loads(layer):
                self._keep(layer, group)
                continue
            differs = resolve.settings(layer, self.file.config(group))
            self.problems += [p for p in (undeclared.get(layer.path), differs) if p is not None]
            self._load(layer, group, parts, why)

    def account(
        self, layers: Sequence[Layer], groups: Sequence[Group], matches: Sequence[Match]
    ) -> None:
        """Lists leaves without a tensor, and tensors without a leaf."""
        matched = {id(m.group) for m in matches}
        paired = {m.layer.path for m in matches}
        free = [
            name for group in groups if id(group) not in matched for name in group.tensors.values()
        ]
        wanted: dict[str, str] = {}  # missing names, and the leaves that they would fill
        for layer in layers:
            if layer.path in paired:
                continue
            for part in layer.parts():
                leaf = layer.leaves[part.leaf]
                names = [_dotted(layer, source) for source in part.sources]
                wanted |= dict.fromkeys(names, leaf.path)
                self._missing(leaf, names, free)
        used = {
            pair.names[source]
            for pair in self.pairs
            for part in pair.parts
            for source in part.sources
            if source in pair.names
        }
        for name in free:
            partners = [n for tie in self.file.tied if name in tie for n in tie]
            if found := next((n for n in partners if n in used), None):
                self.dropped[name] = f"tied to {found}"
            elif any(self.dropped.get(n) == _NOT_SELECTED for n in partners):
                self.dropped[name] = _NOT_SELECTED
            else:
                close = [wanted[near] for near in self._nearest(name, wanted)]
                hint = (
                    f"nearest unfilled: {_listed(close)}"
                    if close
                    else "no unfilled leaf has a similar name"
                )
                self._left_over(name, hint)

    def report(self) -> Report:
        """The finished mapping, or the error that lists all problems."""
        if self.problems:
            raise fault(f"{self.file.name} does not fit the parameters", self.problems)
        in_order = [self.entries[x.path] for x in self.tree.leaves if x.path in self.entries]
        return Report(
            tuple(in_order), self.kept, self.dropped, self.pairs, self.tree, self.file.tensors
        )

    def _keep(self, layer: Layer, group: Group) -> None:
        self.kept |= {leaf.path: _NOT_SELECTED for leaf in layer.leaves.values()}
        self.dropped |= dict.fromkeys(group.tensors.values(), _NOT_SELECTED)

    def _load(self, layer: Layer, group: Group, parts: Sequence[Part], why: str) -> None:
        """Enters the selected leaves of a layer, and accounts for each of its tensors."""
        taken: dict[str, bool] = {}  # sources, and whether a selected leaf takes them
        for part in parts:
            path = layer.leaves[part.leaf].path
            loaded = path in self.selected
            taken |= {source: loaded or taken.get(source, False) for source in part.sources}
            if loaded:
                self._check(layer, group, part, why)
            else:
                self.kept[path] = _NOT_SELECTED
        for short, name in group.tensors.items():
            if short not in taken:
                reason = f"its layer {layer.path!r} has no leaf for it"
                if short.startswith("running_"):
                    reason += "; Linen's are in batch_stats: pass all variables"
                self._left_over(name, reason)
            elif not taken[short]:
                self.dropped[name] = _NOT_SELECTED

    def _check(self, layer: Layer, group: Group, part: Part, why: str) -> None:
        """Enters a leaf if names, shapes and dtypes agree; records a problem otherwise."""
        leaf = layer.leaves[part.leaf]
        absent = [source for source in part.sources if source not in group.tensors]
        if absent:
            wanted = [_dotted(layer, source) for source in absent]
            self._missing(leaf, wanted, list(group.tensors.values()))
            return
        names = tuple(group.tensors[source] for source in part.sources)
        expected = part.torch_shape(leaf.shape)
        before = len(self.problems)
        for name in names:
            tensor = self.file.tensors[name]
            what = describe(name, tensor)
            if tensor.shape != expected:
                self._problem("shape", f"{what} should be {list(expected)} for {leaf} ({part})")
            elif tensor.dtype != leaf.dtype:
                self._problem("dtype", f"{what} should be {leaf.dtype} for {leaf}")
        if part.zero_last and len(self.problems) == before:
            last = self.file.tensors[names[1]][2 * leaf.shape[0] // 3 :]
            if np.any(last != 0):
                self._problem(
                    "layout",
                    f"{names[1]!r} has a bias inside the reset gate (its last third), which {leaf} "
                    "can't hold: nnx.GRUCell has no such bias. Give the cell one: "
                    "cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)",
                )
        if len(self.problems) == before:
            self.entries[leaf.path] = Entry(
                leaf.path, names, leaf.shape, leaf.dtype, str(part), why
            )

    def _missing(self, leaf: Leaf, wanted: Sequence[str], free: Iterable[str]) -> None:
        if leaf.path not in self.selected:
            self.kept[leaf.path] = _NOT_SELECTED
            return
        close = self._nearest(wanted[0] if wanted else leaf.path.replace("/", "."), free)
        found = [describe(name, self.file.tensors[name]) for name in close]
        names = " + ".join(map(repr, wanted)) or "tensor of this name"
        hint = f"nearest: {listed(found)}" if found else "no name is similar"
        self._problem("missing", f"{leaf}: the file has no {names}; {hint}")

    def _left_over(self, name: str, why: str) -> None:
        self._problem("left over", f"{describe(name, self.file.tensors[name])}: {why}")

    def _nearest(self, name: str, candidates: Iterable[str]) -> list[str]:
        # Each search compares all candidates, which would take minutes for thousands of problems.
        candidates = list(candidates)
        self.compared += len(candidates)
        return nearest(name, candidates) if self.compared < _MOST_COMPARED else []

    def _problem(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, text))


def _dotted(layer: Layer, source: str) -> str:
    return ".".join(part for part in (layer.name.replace("/", "."), source) if part)


def _listed(names: Iterable[str]) -> str:
    return listed(map(repr, names))
