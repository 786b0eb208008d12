"""Renames PyTorch names by rules, and groups them into modules.

Rules use the pattern language of `wrt`, with `.` between levels as in PyTorch. The stars of the
replacement stand for what the stars of the pattern matched, in order, so a rule reads as two names
side by side.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from jaxgrad._text import listed, nearest
from jaxgrad._tree.pattern import compiled, matches
from jaxgrad.torch._mapping.flax_layers import KINDS
from jaxgrad.torch._mapping.layouts import Array
from jaxgrad.torch._mapping.report import MappingError

# Buffers that hold no learned value: counters, and tables that a constructor computes.
BOOKKEEPING = frozenset(
    {"num_batches_tracked", "position_ids", "relative_position_index", "inv_freq"}
)
Flatten: TypeAlias = int | Literal[False] | None
"""The channels before a flatten, False where there is none, None where nothing is declared."""
_OWN = {"weight", "bias", "running_mean", "running_var"}
PACKED = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
_STARS = re.compile(r"\*+")
_CELL = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh)(?:_l(\d+)(_reverse)?)?")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the PyTorch names that match a pattern.

    Rules are ordered, and the first match wins: the first matching rule that renames or drops
    decides a name, the first that declares a layer or a flatten decides that.

    Attributes:
        pattern: a glob over PyTorch names, in the language of `wrt` (see `select`): the name of a
            module, `features.0`, takes everything inside it.
        path: the Flax path that replaces it. Its stars stand, in order, for what the pattern's
            stars matched. None keeps the name.
        drop: leaves the tensors out.
        layer: the layer type, if it is ambiguous: "linear", "conv", "conv_transpose", "norm",
            "embedding"; or "same" for a custom parameter, and for a layer that PyTorch stores in
            Flax's layout (GPT-2's `Conv1D` is a linear layer with an (in, out) weight).
        flatten: for the layer after a flatten of convolutional features, their number of channels:
            PyTorch flattens (channels, height, width), Flax (height, width, channels). False if
            the Flax model flattens channels first too.

    Raises:
        MappingError: the rule does nothing, or contradicts itself.

    Example:
        >>> import jaxgrad as jg
        >>> rename = jg.torch.Rule("encoder.layer.*.output", "blocks/*/out")
        >>> declare = jg.torch.Rule("fc1", flatten=16)
        >>> jg.torch.Rule("fc1")
        Traceback (most recent call last):
            ...
        jaxgrad.torch.MappingError: Rule('fc1') does nothing: give it a path, drop, layer or flatten

    Source: the `key_mapping` of Transformers' `from_pretrained`, as globs.
    """

    pattern: str
    path: str | None = None
    _: dataclasses.KW_ONLY
    drop: bool = False
    layer: str | None = None
    flatten: Flatten = None

    def __post_init__(self) -> None:
        what = f"Rule({self.pattern!r})"
        if self.path is None and not self.drop and self.layer is None and self.flatten is None:
            raise MappingError(f"{what} does nothing: give it a path, drop, layer or flatten")
        if self.drop and self.path is not None:
            raise MappingError(f"{what} drops and renames to {self.path!r}: choose one")
        if self.layer is not None and self.layer not in KINDS:
            raise MappingError(f"{what}: layer={self.layer!r} is not one of {', '.join(KINDS)}")
        if self.flatten is True or (self.flatten is not None and self.flatten < 0):
            raise MappingError(
                f"{what}: flatten={self.flatten!r} must be the number of channels before the "
                "flatten, or False"
            )
        try:
            stars = compiled(_slashed(self.pattern)).groups - 1
        except re.error as e:
            raise MappingError(f"{what} is not a valid glob: {e}") from e
        if self.path is not None and len(_STARS.findall(self.path)) > stars:
            raise MappingError(
                f"{what}: the replacement {self.path!r} has more stars than the pattern"
            )

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.path}" if self.path is not None else self.pattern

    def renamed(self, names: Sequence[str]) -> dict[str, str]:
        """The Flax paths of those PyTorch names that the pattern takes, by name."""
        glob, paths = _slashed(self.pattern), [_slashed(name) for name in names]
        taken = zip(names, paths, matches(glob, paths), strict=True)
        return {name: self._replaced(glob, path) for name, path, hit in taken if hit}

    def _replaced(self, glob: str, path: str) -> str:
        if self.path is None:
            return path
        found = compiled(glob).fullmatch(path)
        # Only a pattern that is literally a name (`w[0]`) takes a name that its glob doesn't match.
        *stars, rest = found.groups(default="") if found else [path[len(glob) :]]
        filled = iter(stars)
        levels = [
            _STARS.sub(lambda _: next(filled, "").strip("/"), level)
            for level in _slashed(self.path).split("/")
        ]
        return "/".join(level for level in [*levels, rest.strip("/")] if level)


Rules: TypeAlias = Iterable[Rule | tuple[str, str]]
Matched: TypeAlias = Sequence[tuple[Rule, Mapping[str, str]]]
"""Each rule, with the Flax paths of the names that it takes."""


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one PyTorch module.

    Attributes:
        path: the module's name after the rules, with `/` between levels. Each layer of a
            multi-layer LSTM counts as a module: `lstm/l0`.
        tensors: names within the module (`weight`; `bias_ih` without its `_l0`), mapped to names
            in the file. A bare parameter has the name "".
        renamed: the rule that renamed it, as text.
        layer: the layer type that a rule declared.
        flatten: what a rule declared about a flatten.
    """

    path: str
    tensors: Mapping[str, str]
    renamed: str | None = None
    layer: str | None = None
    flatten: Flatten = None


@dataclasses.dataclass(frozen=True)
class Names:
    """All names of a file: grouped into modules, or dropped, with the reason."""

    groups: Sequence[Group]
    dropped: Mapping[str, str]


def as_rules(rules: Rules) -> list[Rule]:
    """Converts (pattern, replacement) pairs to `Rule`s."""
    made = []
    for rule in rules:
        if isinstance(rule, Rule):
            made.append(rule)
        elif isinstance(rule, tuple) and len(rule) == 2 and all(isinstance(r, str) for r in rule):
            made.append(Rule(*rule))
        else:
            raise MappingError(
                f"a rule is a (pattern, replacement) pair of strings or a jaxgrad.torch.Rule, "
                f"not {rule!r}"
            )
    return made


def group(
    names: Iterable[str], rules: Sequence[Rule], own: Mapping[str, str], bare: Iterable[str]
) -> Names:
    """Renames and groups the names of a file.

    Args:
        names: PyTorch names, in file order.
        rules: the rules, in order.
        own: paths of Flax leaves that one tensor fills, mapped to the path of that tensor
            (`head/kernel` -> `head/weight`), so that a rule may name the leaf itself.
        bare: paths of Flax leaves outside of any layer.
    """
    names, bare = list(names), set(bare)
    matched = apply(rules, names)
    dropped: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    rule_of: dict[str, Rule | None] = {}
    packed = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in PACKED}
    for name in names:
        path, rule = rename(name, matched)
        if path is None:
            dropped[name] = f"dropped by the rule {rule}"
            continue
        path = own.get(path, path)
        if path not in bare and path.rpartition("/")[2] in BOOKKEEPING:
            dropped[name] = "bookkeeping, holds no parameter"
            continue
        module, tensor = _split(path, bare, name, packed)
        tensors = found.setdefault(module, {})
        if tensor in tensors:
            raise MappingError(
                f"the tensors {tensors[tensor]!r} and {name!r} both map to {path!r}: change "
                "the rules so that each has its own path, or drop one with Rule(..., drop=True)"
            )
        tensors[tensor] = name
        rule_of.setdefault(module, rule)
    groups = []
    for module, tensors in found.items():
        layer, flatten = declared(tensors.values(), matched)
        rule = rule_of[module]
        groups.append(Group(module, tensors, str(rule) if rule else None, layer, flatten))
    return Names(_only_layer_zero(groups), dropped)


def apply(rules: Sequence[Rule], names: Sequence[str]) -> Matched:
    """Matches rules with names; a rule that takes none is an error."""
    matched = [(rule, rule.renamed(names)) for rule in rules]
    for rule, paths in matched:
        if not paths:
            modules = [name.rpartition(".")[0] for name in names]
            close = nearest(rule.pattern, [*names, *modules])
            hint = f"; nearest: {listed(map(repr, close))}" if close else ""
            raise MappingError(f"the rule {str(rule)!r} matches no name in the file{hint}")
    return matched


def rename(name: str, matched: Matched) -> tuple[str | None, Rule | None]:
    """The Flax path of a name, None if it is dropped, and the rule that decides."""
    for rule, paths in matched:
        if (rule.drop or rule.path is not None) and name in paths:
            return (None if rule.drop else paths[name]), rule
    return _slashed(name), None


def _slashed(name: str) -> str:
    return name.replace(".", "/")


def declared(names: Iterable[str], matched: Matched) -> tuple[str | None, Flatten]:
    """The layer type and the flatten that rules declare for the module of these names."""
    names = list(names)
    matching = [rule for rule, paths in matched if any(name in paths for name in names)]
    layer = next((rule.layer for rule in matching if rule.layer is not None), None)
    flatten = next((rule.flatten for rule in matching if rule.flatten is not None), None)
    return layer, flatten


def _split(path: str, bare: set[str], name: str, packed: set[str]) -> tuple[str, str]:
    """Splits a path into module and tensor; some of PyTorch's modules span two levels."""
    if path in bare:
        return path, ""
    module, _, tensor = path.rpartition("/")
    owner = name.rpartition(".")[0]
    if owner.endswith("out_proj") and owner.rpartition(".")[0] in packed:
        return module.rpartition("/")[0], f"out_proj.{tensor}"
    if cell := _CELL.fullmatch(tensor):
        parts = [module, *([f"l{cell[2]}"] if cell[2] else []), *(["reverse"] if cell[3] else [])]
        return "/".join(part for part in parts if part), cell[1]
    if tensor in _OWN or tensor in PACKED or owner in packed:
        return module, tensor
    return path, ""


def _only_layer_zero(groups: Sequence[Group]) -> list[Group]:
    """Shortens `lstm/l0` to `lstm` if the LSTM has one layer."""
    paths = [group.path for group in groups if "weight_ih" in group.tensors]

    def shorter(path: str) -> str:
        found = re.fullmatch(r"((?:.*/)?)l0(/reverse)?", path)
        if found is None or path not in paths:
            return path
        if any(re.fullmatch(rf"{re.escape(found[1])}l[1-9]\d*(/reverse)?", p) for p in paths):
            return path
        return (found[1].removesuffix("/") + (found[2] or "")).removeprefix("/")

    return [dataclasses.replace(group, path=shorter(group.path)) for group in groups]


def describe(name: str, array: Array) -> str:
    """`'fc1.weight' float32[512,784]`."""
    return f"{name!r} {array.dtype}[{','.join(map(str, array.shape))}]"
