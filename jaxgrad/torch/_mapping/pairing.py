"""Pairs PyTorch modules with Flax layers, if names or structure determine the pair.

Layers are paired, not tensors, so a layer's weight, bias and statistics stay together. Names
decide first. If they differ, a layer takes the only module that fits it; layers that several
modules fit are paired by their numbers, if both sides count the same way. The rest is not
guessed: it is reported, with candidates, for a rule to decide.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from jaxgrad.torch._mapping.flax_layers import Layer
from jaxgrad.torch._mapping.rules import Group

T = TypeVar("T")
Numbers = tuple[int, ...]
Signature = frozenset[tuple[str, tuple[int, ...]]]


class Match(NamedTuple):
    """A layer, its module, and why they belong together."""

    layer: Layer
    group: Group
    why: str


def pair(
    layers: Sequence[Layer],
    groups: Sequence[Group],
    tensors: Mapping[str, np.ndarray],
    loads: Callable[[Layer], bool],
) -> list[Match]:
    """Pairs layers with modules; those without a partner are left out.

    Args:
        layers: the layers of the Flax tree.
        groups: the modules of the file, renamed.
        tensors: the tensors of the file, by name.
        loads: whether any leaf of a layer is to be loaded; other layers pair by name alone.
    """
    matches: list[Match] = []
    open_layers = {layer.path: layer for layer in layers}
    open_groups = {group.path: group for group in groups}

    def take(found: Iterable[tuple[Layer, Group]], why: str) -> bool:
        taken = list(found)
        for layer, group in taken:
            matches.append(Match(layer, group, group.renamed or why))
            del open_layers[layer.path], open_groups[group.path]
        return bool(taken)

    take(_same_name(open_layers.values(), open_groups.values()), "same name")
    take(_same_end(open_layers.values(), open_groups.values()), "same name under another prefix")
    progress = True
    while progress:
        progress = False
        needed = [layer for layer in open_layers.values() if loads(layer)]
        for ours, theirs in _of_one_shape(needed, list(open_groups.values()), tensors):
            if len(ours) == len(theirs) == 1:
                progress |= take([(ours[0], theirs[0])], "only one that fits")
            else:
                progress |= take(_alike_in_name(ours, theirs), "same last word, numbered alike")
    return matches


def _same_name(layers: Iterable[Layer], groups: Iterable[Group]) -> list[tuple[Layer, Group]]:
    by_path = {group.path: group for group in groups}
    found: list[tuple[Layer, Group]] = []
    for layer in layers:
        group = by_path.get(layer.path) or by_path.get(layer.name)
        if group is not None and all(group is not other for _, other in found):
            found.append((layer, group))
    return found


def _same_end(layers: Iterable[Layer], groups: Iterable[Group]) -> list[tuple[Layer, Group]]:
    """Pairs `module.head` with `head`: one path ends in the other, and no other does."""
    layers = list(layers)
    by_word: dict[str, list[Group]] = collections.defaultdict(list)
    for group in groups:
        by_word[group.path.rpartition("/")[2]].append(group)
    ours: dict[str, list[Group]] = collections.defaultdict(list)
    theirs: dict[str, list[Layer]] = collections.defaultdict(list)
    for layer in layers:
        for group in by_word[layer.name.rpartition("/")[2]] if layer.name else ():
            if _ends(layer.name, group.path):
                ours[layer.path].append(group)
                theirs[group.path].append(layer)
    return [
        (layer, ours[layer.path][0])
        for layer in layers
        if len(ours[layer.path]) == 1 and len(theirs[ours[layer.path][0].path]) == 1
    ]


def _ends(a: str, b: str) -> bool:
    return f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}")


def _of_one_shape(
    layers: Sequence[Layer], groups: Sequence[Group], tensors: Mapping[str, np.ndarray]
) -> list[tuple[list[Layer], list[Group]]]:
    """Groups the layers and modules that have the same tensor names and shapes."""
    ours: dict[Signature, list[Layer]] = collections.defaultdict(list)
    theirs: dict[Signature, list[Group]] = collections.defaultdict(list)
    for layer in layers:
        ours[_needed(layer)].append(layer)
    for group in groups:
        theirs[_given(group, tensors)].append(group)
    return [(ours[key], theirs[key]) for key in ours if key in theirs]


def _needed(layer: Layer) -> Signature:
    return frozenset(
        (source, part.torch_shape(layer.leaves[part.leaf].shape))
        for part in layer.parts()
        for source in part.sources
    )


def _given(group: Group, tensors: Mapping[str, np.ndarray]) -> Signature:
    return frozenset((short, tensors[name].shape) for short, name in group.tensors.items())


def _alike_in_name(layers: Sequence[Layer], groups: Sequence[Group]) -> list[tuple[Layer, Group]]:
    """Pairs by last words and numbers: `fc1`, `fc2` with `Dense_0`, `Dense_1`.

    Names that differ only in their numbers form a family. Two families are paired if no others
    remain or if their names end in the same word, and only if they are numbered alike: the same
    nesting, with equally many at each level.
    """
    ours, theirs = _families((x.name, x) for x in layers), _families((x.path, x) for x in groups)
    found: list[tuple[Layer, Group]] = []
    for mine in ours:
        alone = len(ours) == len(theirs) == 1
        ends = [name for name in theirs if alone or _last(name) == _last(mine)]
        rivals = [name for name in ours if _last(name) == _last(mine)]
        if len(ends) != 1 or len(rivals) != 1:
            continue
        a, b = _ranked(ours[mine]), _ranked(theirs[ends[0]])
        if a.keys() == b.keys():
            found += [(a[place], b[place]) for place in a]
    return found


def _families(named: Iterable[tuple[str, T]]) -> dict[str, dict[Numbers, T]]:
    families: dict[str, dict[Numbers, T]] = collections.defaultdict(dict)
    for name, item in named:
        families[re.sub(r"\d+", "#", name)][tuple(map(int, re.findall(r"\d+", name)))] = item
    return families


def _ranked(family: Mapping[Numbers, T]) -> dict[Numbers, T]:
    """Turns numbers into ranks, position by position, and drops positions that are constant."""
    places = [sorted(set(column)) for column in zip(*family, strict=True)]
    return {
        tuple(
            place.index(number)
            for place, number in zip(places, numbers, strict=True)
            if len(place) > 1
        ): item
        for numbers, item in family.items()
    }


def _last(name: str) -> str:
    return re.sub(r"[\d#_]+", "", name.rpartition("/")[2])
