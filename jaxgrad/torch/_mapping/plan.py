"""The account of a mapping: every tensor and every leaf has an entry, a reason, or a problem.

Problems are collected and raised together, since a mapping is repaired by reading all of it.
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


@dataclasses.dataclass
class Ledger:
    """The mapping in the making: what is settled, and what stands against it."""

    file: File
    tree: Tree
    optional: set[str]
    dropped: dict[str, str]
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    kept: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    compared: int = 0

    def settle(self, matches: Sequence[Match]) -> None:
        """Decides each pair's layout, and checks names, shapes and dtypes."""
        shapes = {name: x.shape for name, x in self.file.tensors.items()}
        place = {name: i for i, name in enumerate(shapes)}
        matches = sorted(matches, key=lambda m: min(place[n] for n in m.group.tensors.values()))
        layers = [resolve.typed(m, self.file.kind(m.group), shapes) for m in matches]
        self.problems += [layer for layer in layers if isinstance(layer, Problem)]
        matches = [
            m._replace(layer=layer)
            for m, layer in zip(matches, layers, strict=True)
            if isinstance(layer, Layer)
        ]
        channels, problems = resolve.channels(matches, self.tree)
        self.problems += problems
        for layer, group, why in matches:
            if differs := resolve.settings(layer, self.file.config(group)):
                self.problems.append(differs)
            parts = layer.parts(
                channels=channels.get(layer.path, 1), separate="q_proj_weight" in group.tensors
            )
            self.pairs.append(Pair(layer, parts, group.tensors, why))
            if not self._keep_whole(layer, group, parts):
                for part in parts:
                    self._check(layer, group, part, why)
            known = {source for part in parts for source in part.sources}
            for short, name in group.tensors.items():
                if short not in known:
                    reason = f"its layer {layer.path!r} has no leaf for it"
                    if short.startswith("running_"):
                        reason += "; Linen's are in batch_stats: pass all variables"
                    self._left_over(name, reason)

    def account(
        self, layers: Sequence[Layer], groups: Sequence[Group], matches: Sequence[Match]
    ) -> None:
        """Lists leaves without a tensor, and tensors without a leaf."""
        matched = {id(m.group) for m in matches}
        paired = {m.layer.path for m in matches}
        free = [
            name for group in groups if id(group) not in matched for name in group.tensors.values()
        ]
        wanted: dict[str, str] = {}  # names that a file should have, to the leaves they fill
        for layer in layers:
            if layer.path in paired:
                continue
            for part in layer.parts():
                leaf = layer.leaves[part.leaf]
                names = [_dotted(layer, source) for source in part.sources]
                wanted |= dict.fromkeys(names, leaf.path)
                self._missing(leaf, names, free)
        used = {name for entry in self.entries.values() for name in entry.sources}
        for name in free:
            partners = [n for tie in self.file.tied if name in tie for n in tie if n in used]
            if partners:
                self.dropped[name] = f"tied to {partners[0]}"
            else:
                close = [wanted[near] for near in self._nearest(name, wanted)]
                hint = f"nearest unfilled: {_listed(close)}" if close else "no leaf is near"
                self._left_over(name, hint)

    def report(self) -> Report:
        """The finished mapping, or the error that lists all problems."""
        if self.problems:
            raise fault(f"{self.file.name} does not fit the parameters", self.problems)
        in_order = [self.entries[x.path] for x in self.tree.leaves if x.path in self.entries]
        return Report(
            tuple(in_order), self.kept, self.dropped, self.pairs, self.tree, self.file.tensors
        )

    def _keep_whole(self, layer: Layer, group: Group, parts: Sequence[Part]) -> bool:
        """Keeps a layer that may stay as it is, if one of its tensors has another shape.

        A new head often shares its name and some shapes with the old one; half of each is neither.
        """
        if any(leaf.path not in self.optional for leaf in layer.leaves.values()):
            return False
        shapes = {source: self.file.tensors[name].shape for source, name in group.tensors.items()}
        if all(
            shapes.get(source, wanted) == wanted
            for part in parts
            for wanted in [part.torch_shape(layer.leaves[part.leaf].shape)]
            for source in part.sources
        ):
            return False
        for leaf in layer.leaves.values():
            self.kept[leaf.path] = "the file has it in other shapes"
        for name in group.tensors.values():
            self.dropped[name] = f"{layer.path} has other shapes and stays as it is"
        return True

    def _check(self, layer: Layer, group: Group, part: Part, why: str) -> None:
        """Enters a leaf that all agrees on; lists what does not."""
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
                    f"{names[1]!r} has a bias inside the reset gate (its last third), for which "
                    f"{leaf} has no room: nnx.GRUCell has no such bias. Give the cell one: "
                    "cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)",
                )
        if len(self.problems) == before:
            self.entries[leaf.path] = Entry(
                leaf.path, names, leaf.shape, leaf.dtype, str(part), why
            )

    def _missing(self, leaf: Leaf, wanted: Sequence[str], free: Iterable[str]) -> None:
        if leaf.path in self.optional:
            self.kept.setdefault(leaf.path, "not in the file")
            return
        close = self._nearest(wanted[0] if wanted else leaf.path.replace("/", "."), free)
        found = [describe(name, self.file.tensors[name]) for name in close]
        names = " + ".join(map(repr, wanted)) or "tensor of this name"
        hint = f"nearest: {listed(found)}" if found else "none is near"
        self._problem("missing", f"{leaf}: the file has no {names}; {hint}")

    def _left_over(self, name: str, why: str) -> None:
        self._problem("left over", f"{describe(name, self.file.tensors[name])}: {why}")

    def _nearest(self, name: str, candidates: Iterable[str]) -> list[str]:
        # Each search reads all candidates: with thousands of problems it would take minutes.
        candidates = list(candidates)
        self.compared += len(candidates)
        return nearest(name, candidates) if self.compared < _MOST_COMPARED else []

    def _problem(self, kind: str, text: str) -> None:
        self.problems.append(Problem(kind, text))


def _dotted(layer: Layer, source: str) -> str:
    return ".".join(part for part in (layer.name.replace("/", "."), source) if part)


def _listed(names: Iterable[str]) -> str:
    return listed(map(repr, names))
