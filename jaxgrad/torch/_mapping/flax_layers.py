"""A Flax tree as layers: which leaves belong together, and of which type they are.

The type of a layer decides its layout. An NNX module says it by its classes. A tree of arrays
(an NNX State, Linen variables, a dict) has only names left, and Flax's own are a convention
that nearly decides: `scale`, `mean` and `var` belong to a norm, `embedding` to an embedding, a
`kernel` of two axes to a linear layer, `ii`, `hi`, ... to a cell, `query`, `key`, `value` and
`out` to attention. What they leave open (a convolution or a transposed one, a parameter of the
user's own) stays open here, and is decided by the file, by a rule, or not at all.
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
"""What a rule may declare."""
# A parameter on its own, of a declared type.
_ALONE: dict[str, layouts.Layout] = {
    "linear": layouts.Matrix(),
    "conv": layouts.Kernel(),
    "conv_transpose": layouts.Kernel(flipped=True),
}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the tree: its full path, and its place in the flattened tree."""

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
        path: without the Linen collection: `params/head/kernel` is in the layer `head`.
        kind: a key of `GATES`, one of `KINDS`, `attention`, `conv?` (a convolution or a
            transposed one), `conv_transpose?` (with or without `transpose_kernel`) or `?` (no
            layer type is known).
        leaves: by their path below the layer; a leaf on its own has the path "".
        in_axes: how many axes of a linear kernel are inputs.
        flipped: for `conv_transpose`, whether Flax holds the kernel flipped.
        sequence: for a cell, whether it is the `cell` of an RNN, which runs it over a sequence.
        epsilon: of a norm, where a module tells.
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
        """The path by which its PyTorch module would go: `rnn/cell` is `rnn`."""
        if not self.sequence:
            return self.path
        name = self.path.removesuffix("cell").removesuffix("/")
        return re.sub(r"(^|/)forward_rnn$", "", re.sub(r"\bbackward_rnn$", "reverse", name))


@dataclasses.dataclass(frozen=True)
class Tree:
    """A parameter tree: what is needed to read it and to build its like.

    Attributes:
        flat: the leaves; of an NNX module, those of its state.
        leaves: the arrays that a file can hold (no PRNG keys, no caches), in order.
        order: paths of the leaves as the container holds them: a module's attributes and a
            Linen dict stand in the order in which they were made, unless JAX has sorted them.
        graphdef: of an NNX module.
        module: the NNX module, where it is one.
    """

    flat: _flat.Flat
    leaves: Sequence[Leaf]
    order: Sequence[str]
    graphdef: nnx.GraphDef | None = None
    module: nnx.Module | None = None

    def layers(self, *, packed_attention: bool) -> list[Layer]:
        """The layers; attention as one where the file packs it, else as four linear ones."""
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
        """The inner nodes, without Linen's collections, to their leaves by the path from there."""
        nodes: dict[str, dict[str, Leaf]] = {}
        for leaf in self.leaves:
            parts = bare(leaf.path).split("/")
            for depth in range(len(parts)):
                nodes.setdefault("/".join(parts[:depth]), {})["/".join(parts[depth:])] = leaf
        return nodes

    @property
    def flattens_channels_first(self) -> bool:
        """Whether the model moves channels first before it flattens, as PyTorch does."""
        if self.module is None:
            return False
        return any(isinstance(module, Flatten) for _, module in nnx.iter_modules(self.module))

    def filled(self, values: Mapping[str, np.ndarray]) -> _flat.PyTree:
        """The tree with new values by path; the other leaves are the same objects."""
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
    """Takes a parameter tree apart: an NNX module or State, Linen variables, any pytree."""
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
    """Paths of NNX Variables that no file holds: random streams, caches, sown values."""
    kinds = (nnx.RngState, nnx.Cache, nnx.Intermediate)
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    keystr = jax.tree_util.keystr
    return {keystr(p, simple=True, separator="/") for p, node in nodes if isinstance(node, kinds)}


def _in_order(node: object, path: str = "") -> Iterator[str]:
    """Paths of the leaves in the order in which the containers hold them."""
    if isinstance(node, nnx.List | list | tuple):
        items: Iterable[tuple[object, object]] = enumerate(node)
    elif isinstance(node, nnx.Module):  # some of which have a `dtype`, as arrays have
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
    """The layer without leaves that its type doesn't have; None if that leaves none."""
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
    # Of a transposed one the name doesn't tell whether it has `transpose_kernel`.
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
    """The new value as the leaf was: a NumPy array stays one, a JAX array keeps its sharding."""
    if isinstance(old, np.ndarray):
        return np.array(new)
    # A copy: the file's own pages are read-only, and JAX may otherwise share and donate them.
    value = jax.numpy.array(new, copy=True)
    return jax.device_put(value, old.sharding) if isinstance(old, jax.Array) else value
