"""Writes a Flax tree as a file that PyTorch opens.

The parts that fill a Flax tree are read backwards. The report of the mapping that filled the tree
restores the file's names and layouts; without one, names are the Flax paths with dots.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxgrad._disk import safetensors as _safetensors
from jaxgrad._disk.atomic import replacing
from jaxgrad._tree.flat import PyTree
from jaxgrad.torch._mapping import layouts as _layouts
from jaxgrad.torch._mapping import resolve
from jaxgrad.torch._mapping import rules as _rules
from jaxgrad.torch._mapping.flax_layers import Layer, Tree, read_tree
from jaxgrad.torch._mapping.layouts import Array, Part
from jaxgrad.torch._mapping.pairing import Match
from jaxgrad.torch._mapping.report import MappingError, Pair, Problem, Report, fault
from jaxgrad.torch._mapping.rules import Group, Rules
from jaxgrad.torch._writing import state_dict as _state_dict

_FORMATS = {".pt": "pt", ".pth": "pt", ".bin": "pt", ".safetensors": "safetensors"}


def save_torch(
    params: PyTree,
    path: str | os.PathLike[str],
    *,
    like: Report | None = None,
    rules: Rules = (),
) -> None:
    """Writes a Flax tree as a PyTorch state dict or a safetensors file.

    The write is atomic, and reading the file back returns the same bits. PyTorch opens a `.pt` with
    `torch.load(path, weights_only=True)`.

    Args:
        params: an NNX module or State, Linen variables or their params, or any pytree of arrays.
        path: ends in `.pt`, `.pth` or `.bin` for a state dict, in `.safetensors` for safetensors.
        like: the report of the mapping that filled the tree, to restore that file's names and
            layouts. Leaves that were not loaded are written too.
        rules: as in `load_into`, over the names to write, for layers that `like` does not cover:
            renames, and what must be declared. A name is the Flax path with dots and PyTorch's
            name of the tensor: `layers/0/kernel` is `layers.0.weight`.

    Raises:
        MappingError: a layout or a flatten must be declared, the suffix is unknown, the format
            cannot hold a dtype, two tensors have the same name, or `like` is the report of another
            tree.

    Example:
        >>> import numpy as np, jaxgrad as jg, tempfile, os
        >>> params = {"fc": {"kernel": np.ones((3, 2), np.float32)}}
        >>> path = os.path.join(tempfile.mkdtemp(), "fc.pt")
        >>> jg.torch.save_torch(params, path)
        >>> {name: x.shape for name, x in jg.torch.read(path).tensors.items()}
        {'fc.weight': (2, 3)}

    Source: `torch.save(model.state_dict(), path)`.
    """
    save_tensors(to_torch(params, like=like, rules=rules), path)


def save_tensors(tensors: Mapping[str, Array], path: str | os.PathLike[str]) -> None:
    """Writes tensors, with names and layouts unchanged, as a state dict or a safetensors file.

    Args:
        tensors: arrays by PyTorch's names, as `read` and `to_torch` return them.
        path: as in `save_torch`.

    Raises:
        MappingError: the suffix is unknown, or the format cannot hold a dtype.

    Example:
        >>> import numpy as np, jaxgrad as jg, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "fc.safetensors")
        >>> jg.torch.save_tensors({"fc.weight": np.ones((2, 3), np.float32)}, path)
        >>> jg.torch.read(path).tensors["fc.weight"].shape
        (2, 3)

    Source: `torch.save(state_dict, path)`.
    """
    path = Path(path)
    kind = _FORMATS.get(path.suffix)
    if kind is None:
        raise MappingError(f"{path.name!r} must end in one of {', '.join(_FORMATS)}")
    for name, x in tensors.items():
        if x.dtype.name not in (_state_dict.DTYPES if kind == "pt" else _safetensors.DTYPES):
            raise MappingError(f"{_rules.describe(name, x)}: a {kind} file cannot hold {x.dtype}")
    with replacing(path) as file:
        if kind == "pt":
            _state_dict.write_state_dict(file, tensors)
        else:
            _safetensors.write(file, tensors, {"format": "pt"})


def to_torch(
    params: PyTree, *, like: Report | None = None, rules: Rules = ()
) -> dict[str, np.ndarray]:
    """Returns the PyTorch tensors of a Flax tree, by name: what `save_torch` writes.

    Args:
        params: as in `save_torch`.
        like: as in `save_torch`.
        rules: as in `save_torch`.

    Returns:
        Arrays by PyTorch's names; tied names share one array.

    Raises:
        MappingError: as in `save_torch`.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> jg.torch.to_torch({"fc": {"kernel": np.array([[1, 2]])}})
        {'fc.weight': array([[1], [2]])}

    Source: `model.state_dict()`.
    """
    tree = read_tree(params)
    known = {} if like is None else _as_before(tree, like)
    covered = (
        set() if like is None else {x.path for p in like._pairs for x in p.layer.leaves.values()}
    )
    layers = [
        layer
        for layer in tree.layers(packed_attention=True)
        if not any(leaf.path in covered for leaf in layer.leaves.values())
    ]
    new = _by_default(tree, layers, () if like is None else like._pairs, rules)
    if twice := known.keys() & new.keys():
        raise MappingError(f"two tensors are named {min(twice)!r}: rename one with rules")
    return known | new


def _as_before(tree: Tree, like: Report) -> dict[str, np.ndarray]:
    ours = tree.by_path
    tensors: dict[str, np.ndarray] = {}
    for pair in like._pairs:
        for leaf in pair.layer.leaves.values():
            found = ours.get(leaf.path)
            if found is None or found.shape != leaf.shape:
                raise MappingError(
                    f"`like` is the report of another tree: it has {leaf}, but the parameters have "
                    f"{found or 'no such leaf'}"
                )
        given = _to_torch(tree, pair.layer, pair.parts)
        prefix = _prefix(pair.names)
        tensors |= {pair.names.get(short, prefix + short): x for short, x in given.items()}
    for name, why in like.dropped.items():
        if why.startswith("tied to "):
            tensors[name] = tensors[why.removeprefix("tied to ")]
    return tensors


def _prefix(names: Mapping[str, str]) -> str:
    """The prefix of a module's tensor names, including the dot."""
    short, name = next(iter(names.items()))
    return name.removesuffix(short)


def _in_order(matches: Sequence[Match], tree: Tree) -> list[Match]:
    def place(m: Match) -> int:
        return min(tree.by_path[leaf.path].index for leaf in m.layer.leaves.values())

    return sorted(matches, key=place)


def _by_default(
    tree: Tree, layers: Sequence[Layer], covered: Sequence[Pair], rules: Rules
) -> dict[str, np.ndarray]:
    plain = {layer.path: _default_names(layer) for layer in layers}
    every = [name for names in plain.values() for name in names.values()]
    matched = _rules.apply(_rules.as_rules(rules), every)
    matches = []
    for layer in layers:
        names = plain[layer.path]
        kept = {short: new for short, name in names.items() if (new := _renamed(name, matched))}
        kind, flatten = _rules.declared(names.values(), matched)
        if kept:
            group = Group(layer.path, kept, layer=kind, flatten=flatten)
            matches.append(Match(layer, group, "default"))
    typed = [resolve.typed(match, None, {}) for match in matches]
    problems = [layer for layer in typed if isinstance(layer, Problem)]
    matches = [
        match._replace(layer=layer)
        for match, layer in zip(matches, typed, strict=True)
        if isinstance(layer, Layer)
    ]
    # The layers that `like` covers are evidence for a flatten before the others.
    known = [Match(x.layer, Group(x.layer.path, x.names), x.matched) for x in covered]
    channels, undeclared = resolve.channels(_in_order([*matches, *known], tree), tree)
    problems += [undeclared[m.layer.path] for m in matches if m.layer.path in undeclared]
    if problems:
        raise fault("the parameters can't be written for PyTorch", problems)
    tensors: dict[str, np.ndarray] = {}
    for layer, group, _ in matches:
        parts = layer.parts(channels=channels.get(layer.path, 1), separate=_separate(layer))
        for short, x in _to_torch(tree, layer, parts).items():
            name = group.tensors.get(short)
            if name in tensors:
                raise MappingError(f"two tensors are named {name!r}: rename one with rules")
            if name is not None:
                tensors[name] = x
    return tensors


def _to_torch(tree: Tree, layer: Layer, parts: Sequence[Part]) -> dict[str, np.ndarray]:
    places = {part.leaf: tree.by_path[layer.leaves[part.leaf].path].index for part in parts}
    leaves = {name: np.asarray(tree.flat.leaves[index]) for name, index in places.items()}
    return _layouts.to_torch(parts, leaves)


def _separate(layer: Layer) -> bool:
    """Whether query, key and value take inputs of different width."""
    if layer.kind != "attention":
        return False
    return len({layer.leaves[f"{name}/kernel"].shape for name in ("query", "key", "value")}) > 1


def _default_names(layer: Layer) -> dict[str, str]:
    """Maps names within the module to full names, as in PyTorch's layer of this type."""
    module, suffix = layer.name, ""
    if layer.sequence:  # a torch.nn.LSTM, not a torch.nn.LSTMCell
        suffix = "_l0"
        if module.rpartition("/")[2] == "reverse":
            module, suffix = module.removesuffix("reverse").rstrip("/"), "_l0_reverse"
    prefix = module.replace("/", ".")
    parts = layer.parts(separate=_separate(layer))
    shorts = dict.fromkeys(source for part in parts for source in part.sources)
    return {s: ".".join(x for x in (prefix, f"{s}{suffix}") if x) for s in shorts}


def _renamed(name: str, matched: _rules.Matched) -> str | None:
    path, rule = _rules.rename(name, matched)
    if path is None or rule is None:
        return None if path is None else name
    return path.replace("/", ".")
