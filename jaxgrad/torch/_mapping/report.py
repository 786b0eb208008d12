"""The report of a mapping: read it, apply it, or use it to write the file back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxgrad._text import count, table
from jaxgrad._tree.flat import PyTree
from jaxgrad.torch._mapping.flax_layers import Layer, Tree
from jaxgrad.torch._mapping.layouts import Part


class MappingError(ValueError):
    """PyTorch tensors and Flax parameters do not fit; the message lists every problem.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> jg.torch.load_into({"scale": np.zeros(2)}, {})
        Traceback (most recent call last):
            ...
        jaxgrad.torch.MappingError: the mapping does not fit the parameters: 1 problem
        ...

    Source: the "Missing key(s) in state_dict" of `torch.nn.Module.load_state_dict`.
    """

    __module__ = "jaxgrad.torch"


_MOST_SHOWN = 40  # of each kind: the first few show what is wrong, a thousand add nothing


class Problem(NamedTuple):
    """One reason why a mapping fails: a key of `_ADVICE`, and a description."""

    kind: str
    text: str


def fault(what: str, problems: Sequence[Problem]) -> MappingError:
    """An error that lists the problems by kind, each kind with advice."""
    lines = [f"{what}: {count(problems, 'problem', verb=False)}"]
    for kind, advice in _ADVICE.items():
        texts = list(dict.fromkeys(problem.text for problem in problems if problem.kind == kind))
        shown = [f"  {text}" for text in texts[:_MOST_SHOWN]]
        if len(texts) > _MOST_SHOWN:
            shown.append(f"  and {len(texts) - _MOST_SHOWN} more")
        if texts:
            lines += [f"{kind}:", *shown, f"  -> {advice}"]
    return MappingError("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One Flax leaf and what fills it.

    Attributes:
        path: the leaf's path.
        sources: names in the file; several if their sum fills the leaf.
        shape: the leaf's shape.
        dtype: the leaf's dtype.
        layout: how the tensor is rearranged: `(out, in) -> (in, out)`.
        matched: why these names match: `same name`, `only one that fits`, or the rule.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> params = {"fc": {"kernel": np.zeros((3, 2))}}
        >>> entry = jg.torch.match(params, {"fc.weight": np.zeros((2, 3))}).entries[0]
        >>> entry.path, entry.sources, entry.layout
        ('fc/kernel', ('fc.weight',), '(out, in) -> (in, out)')
    """

    path: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    layout: str
    matched: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """A layer and what fills it; `names` maps the names within the module to those in the file."""

    layer: Layer
    parts: Sequence[Part]
    names: Mapping[str, str]
    matched: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """A complete mapping from PyTorch names to Flax leaves; `apply()` carries it out.

    Attributes:
        entries: every leaf that is filled.
        kept: paths of leaves that keep their initial value, with the reason.
        dropped: names in the file that fill no leaf, with the reason.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxgrad as jg
        >>> params = {"fc": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
        >>> tensors = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.ones(2, np.float32)}
        >>> report = jg.torch.match(params, tensors)
        >>> report
        2 of 2 leaves filled
          fc/bias   <- fc.bias    float32[2]    unchanged             same name
          fc/kernel <- fc.weight  float32[3,2]  (out, in) -> (in, out)  same name
        >>> report.apply()["fc"]["kernel"].shape
        (3, 2)
    """

    entries: tuple[Entry, ...]
    kept: Mapping[str, str]
    dropped: Mapping[str, str]
    _pairs: Sequence[Pair] = dataclasses.field(repr=False)
    _tree: Tree = dataclasses.field(repr=False)
    _tensors: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def apply(self) -> PyTree:
        """Returns the tree that was passed to `match`, filled with the file's values.

        Returns:
            A new tree of the same kind. Kept leaves are the same objects as before.

        Example:
            >>> import numpy as np, jaxgrad as jg
            >>> params = {"scale": np.zeros(2, np.float32)}
            >>> jg.torch.match(params, {"scale": np.ones(2, np.float32)}).apply()
            {'scale': array([1., 1.], dtype=float32)}
        """
        values = {}
        filled = {entry.path for entry in self.entries}
        for pair in self._pairs:
            tensors = {short: self._tensors[name] for short, name in pair.names.items()}
            for part in pair.parts:
                leaf = pair.layer.leaves[part.leaf]
                if leaf.path in filled:
                    values[leaf.path] = part.to_flax(tensors, leaf.shape)
        return self._tree.filled(values)

    def __repr__(self) -> str:
        total = len(self.entries) + len(self.kept)
        rows = [
            (
                f"{entry.path} <- {' + '.join(entry.sources)}",
                f"{entry.dtype}[{','.join(map(str, entry.shape))}]",
                entry.layout,
                entry.matched,
            )
            for entry in self.entries
        ]
        lines = [f"{len(self.entries)} of {total} leaves filled", *table(rows, "  ")]
        if self.kept:
            lines += ["kept at their initial value", *table(self.kept.items(), "  ")]
        if self.dropped:
            lines += ["not used", *table(self.dropped.items(), "  ")]
        return "\n".join(lines)


_ADVICE = {
    "missing": 'rename with rules=[("<PyTorch name>", "<Flax path>")], or keep leaves at their '
    'initial value with wrt="!<Flax path>"',
    "left over": 'map it with rules=[("<PyTorch name>", "<Flax path>")], leave it out '
    'with Rule("<PyTorch name>", drop=True), or read one part of a training checkpoint with '
    'read(path).sub("<prefix>")',
    "shape": "build the Flax model with the file's sizes, or pair other names with rules",
    "dtype": "build the Flax model with that param_dtype, or convert the tensors: "
    "{name: x.astype(dtype) for name, x in read(path).tensors.items()}",
    "layout": "layouts are never guessed from shapes: a square matrix looks the same transposed",
    "layer type": "pair other names with rules, or use the same layer in the Flax model",
    "setting": "no tensor shows it: build the Flax layer with the file's setting",
    "flatten": "PyTorch flattens channels first, Flax channels last, and no file records which "
    "order a layer expects",
}
