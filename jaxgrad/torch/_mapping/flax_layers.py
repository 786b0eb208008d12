"""A Flax tree as layers: which leaves belong together, and the type of each layer.

A layer's type decides its layout. The classes of an NNX module determine it. A tree of arrays (an
NNX State, Linen variables, a dict) has only names, and Flax's naming convention nearly determines
it: `scale`, `mean` and `var` belong to a norm, `embedding` to an embedding, a `kernel` of two axes
to a linear layer, `ii`, `hi`, ... to a cell, `query`, `key`, `value` and `out` to attention. The
rest (a convolution or a transposed one, a custom parameter) stays open here; the file or a rule
decides it, or it is an error.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

import jax
import numpy as np
from flax import nnx

from jaxgrad._tree import flat as _flat
from jaxgrad.torch._mapping import layouts
from jaxgrad.torch._mapping.layouts import Array, Part, Shape
from jaxgrad.torch._modules.chain import Flatten

_COLLECTIONS = ("params", "batch_stats")

_CLASSES: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nnx.MultiHeadAttention, "attention"),
    ((nnx.LSTMCell, nnx.OptimizedLSTMCell), "lstm"),
    (nnx.GRUCell, "gru"),
    (nnx.SimpleCell, "rnn"),
    ((nnx.Linear, nnx.LinearGeneral), "linear"),
    (nnx.Conv, "conv"),
    (nnx.ConvTranspose, "conv_transpose"),
    (nnx.Embed, "embedding"),
    ((nnx.BatchNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.RMSNorm), "norm"),
)
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn": ""}
KINDS = ("linear", "conv", "conv_transpose", "norm", "embedding", "same")
"""The layer types that a rule may declare."""
# Layouts of a bare parameter of a declared type.
_ALONE: dict[str, layouts.Layout] = {
    "linear": layouts.Matrix(),
    "conv": layouts.Kernel(),
    "conv_transpose": layouts.Kernel(flipped=True),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the tree: its full path, and its index in the flattened tree."""

    path: str
    index: int
    shape: Shape
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.path!r} {self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of the tree.

    Attributes:
        path: the path without its Linen collection: `params/head/kernel` is in the layer `head`.
        kind: a key of `GATES`, one of `KINDS`, `attention`, `conv?` (a convolution or a
            transposed one), `conv_transpose?` (with or without `transpose_kernel`) or `?` (of
            unknown type).
        leaves: the leaves, by their path within the layer; a bare leaf has the path "".
        in_axes: the number of input axes of a linear kernel.
        flipped: for `conv_transpose`, whether Flax's kernel is flipped.
        sequence: for a cell, whether it is the `cell` of an RNN, which runs it over a sequence.
        epsilon: the epsilon of a norm, if a module has it.
    """

    path: str
    kind: str
    leaves: Mapping[str, Leaf]
    in_axes: int = 1
    flipped: bool = True
    sequence: bool = False
    epsilon: float | None = None

    def parts(self, *, channels: int = 1, separate: bool = False) -> list[Part]:
        """The parts that fill the leaves; see `layouts`."""
        names = list(self.leaves)
        if names == [""]:
            return [Part("", ("",), _ALONE.get(self.kind, layouts.Same()))]
        match self.kind:
            case "linear":
                return layouts.linear(names, in_axes=self.in_axes, channels=channels)
            case "conv" | "conv?":
                return layouts.conv(names)
            case "conv_transpose" | "conv_transpose?":
                return layouts.conv(names, flipped=self.flipped)
            case "norm":
                return layouts.norm(names, channels=channels)
            case "embedding":
                return layouts.embedding(names)
            case "same":
                return layouts.same(names)
            case "attention":
                return layouts.attention(names, separate=separate)
            case _:
                return layouts.cell(names, GATES[self.kind])

    @property
    def name(self) -> str:
        """The path that its PyTorch module would have: `rnn` for `rnn/cell`."""
        if not self.sequence:
            return self.path
        name = self.path.removesuffix("cell").removesuffix("/")
        return re.sub(r"(^|/)forward_rnn$", "", re.sub(r"\bbackward_rnn$", "reverse", name))


@dataclasses.dataclass(frozen=True)
class Tree:
    """A parameter tree, taken apart so that it can be read and rebuilt.

    Attributes:
        flat: the leaves; for an NNX module, those of its state.
        leaves: the arrays that a file can hold (no PRNG keys, no caches), in order.
        order: paths of the leaves in the container's order: a module's attributes and a Linen
            dict keep the order in which they were made, unless JAX has sorted them.
        graphdef: the graph definition of an NNX module.
        module: the NNX module, if it is one.
    """

    flat: _flat.Flat
    leaves: Sequence[Leaf]
    order: Sequence[str]
    graphdef: nnx.GraphDef | None = None
    module: nnx.Module | None = None

    def layers(self, *, packed_attention: bool) -> list[Layer]:
        """The layers; attention is one layer if the file packs it, else four linear ones."""
        found = list(self._declared()) if self.module is not None else list(self._by_name())
        layers = []
        for layer in found:
            if layer.kind == "attention" and not packed_attention:
                layers += _unpacked(layer)
            else:
                layers.append(layer)
        taken = {leaf.path for layer in layers for leaf in layer.leaves.values()}
        layers += [
            Layer(bare(leaf.path), "?", {"": leaf})
            for leaf in self.leaves
            if leaf.path not in taken
        ]
        place = {leaf.path: leaf.index for leaf in self.leaves}
        return sorted(layers, key=lambda layer: min(place[x.path] for x in layer.leaves.values()))

    @functools.cached_property
    def by_path(self) -> Mapping[str, Leaf]:
        """The leaves by path."""
        return {leaf.path: leaf for leaf in self.leaves}

    @functools.cached_property
    def nodes(self) -> Mapping[str, Mapping[str, Leaf]]:
        """The leaves of each inner node, by path from the node; without Linen collections."""
        nodes: dict[str, dict[str, Leaf]] = {}
        for leaf in self.leaves:
            parts = bare(leaf.path).split("/")
            for depth in range(len(parts)):
                nodes.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth:])] = leaf
        return nodes

    @property
    def flattens_channels_first(self) -> bool:
        """Whether the model flattens channels first, as PyTorch does."""
        if self.module is None:
            return False
        return any(isinstance(module, Flatten) for _, module in nnx.iter_modules(self.module))

    def filled(self, values: Mapping[str, np.ndarray]) -> _flat.PyTree:
        """The tree with new values, given by path; the other leaves are the same objects."""
        leaves = list(self.flat.leaves)
        for leaf in self.leaves:
            if leaf.path in values:
                leaves[leaf.index] = _like(leaves[leaf.index], values[leaf.path])
        filled = self.flat.treedef.unflatten(leaves)
        return filled if self.graphdef is None else nnx.merge(self.graphdef, filled, copy=True)

    def _declared(self) -> Iterator[Layer]:
        """The layers of an NNX module, outermost first, by their classes."""
        assert self.module is not None
        modules = sorted(nnx.iter_modules(self.module), key=lambda found: len(found[0]))
        sequences = [path for path, module in modules if isinstance(module, nnx.RNN)]
        taken: set[str] = set()
        for path, module in modules:
            here = "/".join(map(str, path))
            kind = next((kind for cls, kind in _CLASSES if isinstance(module, cls)), None)
            leaves = _untaken(self.nodes.get(here, {}), taken)
            if kind is None or not leaves:
                continue
            axes = len(module.in_features) if isinstance(module, nnx.LinearGeneral) else 1
            flipped = isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
            if isinstance(module, nnx.LinearGeneral) and module.batch_axis:
                continue
            sequence = any(path == (*outer, "cell") for outer in sequences)
            epsilon = getattr(module, "epsilon", None)
            layer = Layer(here, kind, leaves, axes, flipped, sequence, epsilon)
            if found := _with_known_leaves(layer):
                taken |= {leaf.path for leaf in found.leaves.values()}
                yield found

    def _by_name(self) -> Iterator[Layer]:
        """The layers of a tree of arrays, outermost first, by the names of their leaves."""
        taken: set[str] = set()
        for node, inside in sorted(self.nodes.items(), key=lambda item: _depth(item[0])):
            leaves = _untaken(inside, taken)
            kind = _kind_by_name(node, leaves)
            if kind is None:
                continue
            outer, _, last = node.rpartition("/")
            # An RNN holds nothing but its cell.
            alone = len(self.nodes.get(outer, ())) == len(leaves)
            layer = Layer(node, kind, leaves, sequence=kind in GATES and last == "cell" and alone)
            if found := _with_known_leaves(layer):
                taken |= {leaf.path for leaf in found.leaves.values()}
                yield found


def read_tree(params: _flat.PyTree) -> Tree:
    """Takes apart a parameter tree: an NNX module or State, Linen variables, or any pytree."""
    if isinstance(params, nnx.Module):
        graphdef, state = nnx.split(params)
        return Tree(*_leaves(state), tuple(_in_order(params)), graphdef, params)
    return Tree(*_leaves(params), tuple(_in_order(params)))


def _leaves(tree: _flat.PyTree) -> tuple[_flat.Flat, list[Leaf]]:
    flat = _flat.flatten(tree)
    skipped = _bookkeeping(tree)
    leaves = []
    for index, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape") or path in skipped:
            continue
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        leaves.append(Leaf(path, index, tuple(leaf.shape), np.dtype(leaf.dtype)))
    return flat, leaves


def _bookkeeping(tree: _flat.PyTree) -> set[str]:
    """Paths of the NNX Variables that files do not hold: random streams, caches, sown values."""
    kinds = (nnx.RngState, nnx.Cache, nnx.Intermediate)
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    keystr = jax.tree_util.keystr
    return {keystr(p, simple=True, separator="/") for p, node in nodes if isinstance(node, kinds)}


def _in_order(node: object, path: str = "") -> Iterator[str]:
    """Paths of the leaves in their containers' order."""
    if isinstance(node, nnx.List | list | tuple):
        items: Iterable[tuple[object, object]] = enumerate(node)
    elif isinstance(node, nnx.Module):  # before arrays: some modules have a `dtype` too
        items = [(key, value) for key, value in vars(node).items() if not key.startswith("_")]
    elif isinstance(node, Mapping):
        items = node.items()
    else:
        if isinstance(node, nnx.Variable) or hasattr(node, "dtype"):
            yield path
        return
    for key, value in items:
        yield from _in_order(value, f"{path}/{key}" if path else str(key))


def bare(path: str) -> str:
    """A path without its Linen collection."""
    head, _, rest = path.partition("/")
    return rest if head in _COLLECTIONS and rest else path


def _depth(node: str) -> int:
    return (node != "") + node.count("/")


def _untaken(leaves: Mapping[str, Leaf], taken: Set[str]) -> dict[str, Leaf]:
    return {name: leaf for name, leaf in leaves.items() if leaf.path not in taken}


def _with_known_leaves(layer: Layer) -> Layer | None:
    """The layer without the leaves that its type doesn't have; None if none remain."""
    known = {part.leaf for part in layer.parts()}
    leaves = {name: leaf for name, leaf in layer.leaves.items() if name in known}
    return dataclasses.replace(layer, leaves=leaves) if leaves else None


def _kind_by_name(node: str, leaves: Mapping[str, Leaf]) -> str | None:
    def kernels(*names: str) -> bool:
        return all(f"{name}/kernel" in leaves for name in names)

    if kernels("query", "key", "value", "out") and len(leaves["query/kernel"].shape) == 3:
        return "attention"
    if kernels("dense_i", "dense_h"):
        hidden, gates = leaves["dense_h/kernel"].shape
        return {4: "lstm", 3: "gru", 1: "rnn"}.get(gates // hidden)
    if kernels("ii", "ig", "io", "hi", "hf", "hg", "ho"):
        return "lstm"
    if kernels("ir", "iz", "in", "hr", "hz", "hn"):
        return "gru"
    if kernels("i", "h"):
        return "rnn"
    if "kernel" in leaves:
        return _kernel_by_name(node, len(leaves["kernel"].shape))
    if "embedding" in leaves:
        return "embedding"
    if leaves.keys() & {"scale", "mean", "var"}:
        known = [leaf for name, leaf in leaves.items() if name in ("scale", "bias", "mean", "var")]
        return "norm" if all(len(leaf.shape) == 1 for leaf in known) else None
    return None


def _kernel_by_name(node: str, axes: int) -> str | None:
    if axes == 2:
        return "linear"
    if axes < 2:
        return None
    own = node.rpartition("/")[2]
    given = re.fullmatch(r"(Conv|ConvTranspose)_\d+", own)
    if given is None:
        return "conv?"
    # The name of a transposed one doesn't show whether it has `transpose_kernel`.
    return "conv" if given[1] == "Conv" else "conv_transpose?"


def _unpacked(layer: Layer) -> Iterator[Layer]:
    for name, axes in (("query", 1), ("key", 1), ("value", 1), ("out", 2)):
        leaves = {
            path.partition("/")[2]: leaf
            for path, leaf in layer.leaves.items()
            if path.startswith(f"{name}/")
        }
        yield Layer(f"{layer.path}/{name}".lstrip("/"), "linear", leaves, in_axes=axes)


def _like(old: Array | jax.ShapeDtypeStruct, new: np.ndarray) -> Array:
    """The new value, in the old leaf's form: NumPy stays NumPy, a JAX array keeps its sharding."""
    if isinstance(old, np.ndarray):
        return np.array(new)
    # A copy: the file's pages are read-only, and JAX might share and donate them.
    value = jax.numpy.array(new, copy=True)
    return jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value
