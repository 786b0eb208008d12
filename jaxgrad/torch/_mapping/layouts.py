"""The layout of each layer type's tensors in PyTorch and in Flax, in both directions.

A layout belongs to a layer *type*, not to a shape: a square matrix looks the same before and
after its transpose. So a layer is a list of parts, one per Flax leaf. A part names its PyTorch
tensors, the block of their rows that it takes (PyTorch packs the gates of a cell, and query, key
and value, along the first axis) and the layout that turns those rows into the leaf. Read
forwards, the parts fill a Flax tree; read backwards, they write a PyTorch file.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import jax
import numpy as np

Shape: TypeAlias = tuple[int, ...]
Array: TypeAlias = np.ndarray | jax.Array


class Layout(Protocol):
    """A bijection between a PyTorch tensor (or a block of its rows) and a Flax leaf."""

    def torch_shape(self, shape: Shape) -> Shape:
        """The PyTorch shape of a leaf that has `shape` in Flax."""
        ...

    def to_flax(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        """The Flax leaf, of the given shape."""
        ...

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """The PyTorch tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The same array on both sides."""

    def torch_shape(self, shape: Shape) -> Shape:
        return shape

    def to_flax(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        return x

    def __str__(self) -> str:
        return "unchanged"


@dataclasses.dataclass(frozen=True)
class Vector:
    """A vector in PyTorch; in Flax a vector, or one split over several axes (attention heads).

    Attributes:
        channels: the channels of the flattened features that the vector runs over, channels first
            in PyTorch and last in Flax; 1 without such a flatten.
    """

    channels: int = 1

    def torch_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def to_flax(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        return x.reshape(self.channels, -1).T.reshape(shape)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, self.channels).T.reshape(-1)

    def __str__(self) -> str:
        return (
            "unchanged" if self.channels == 1 else f"flatten of {self.channels} channels permuted"
        )


@dataclasses.dataclass(frozen=True)
class Matrix:
    """(out, in) in PyTorch, (in, out) in Flax, where either may be split over several axes.

    Attributes:
        in_axes: the number of input axes of the Flax kernel; they come first.
        channels: the channels of the flattened features that are the inputs; see `Vector`.
    """

    in_axes: int = 1
    channels: int = 1

    def torch_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.in_axes :]), math.prod(shape[: self.in_axes])

    def to_flax(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        out = x.shape[0]
        return x.reshape(out, self.channels, -1).transpose(2, 1, 0).reshape(shape)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        out, inputs = self.torch_shape(x.shape)
        return x.reshape(-1, self.channels, out).transpose(2, 1, 0).reshape(out, inputs)

    def __str__(self) -> str:
        flatten = "" if self.channels == 1 else f", flatten of {self.channels} channels permuted"
        return f"(out, in) -> (in, out){flatten}"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A convolution's kernel: spatial axes come last in PyTorch, first in Flax.

    PyTorch's `Conv` has (out, in / groups, *spatial), its `ConvTranspose` (in, out, *spatial). It
    treats the latter as the gradient of a convolution, so the kernel is flipped relative to
    Flax's, unless that has `transpose_kernel=True`.

    Attributes:
        flipped: whether this is a `ConvTranspose` with `transpose_kernel=False`.
    """

    flipped: bool = False

    def torch_shape(self, shape: Shape) -> Shape:
        *spatial, a, b = shape
        return (a, b, *spatial) if self.flipped else (b, a, *spatial)

    def to_flax(self, x: np.ndarray, shape: Shape) -> np.ndarray:
        spatial = tuple(range(2, x.ndim))
        if self.flipped:
            return np.flip(x, spatial).transpose(*spatial, 0, 1)
        return x.transpose(*spatial, 1, 0)

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        n = x.ndim - 2
        if self.flipped:
            return np.flip(x, tuple(range(n))).transpose(n, n + 1, *range(n))
        return x.transpose(n + 1, n, *range(n))

    def __str__(self) -> str:
        if self.flipped:
            return "(in, out, *spatial) -> (*spatial, in, out), spatial axes flipped"
        return "(a, b, *spatial) -> (*spatial, b, a)"


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one Flax leaf of a layer comes from.

    Attributes:
        leaf: the leaf's path within the layer: `kernel`, `query/kernel`.
        sources: the names of PyTorch tensors within the module. Several are summed: PyTorch's
            cells have two biases, Flax's one.
        layout: turns the rows into the leaf.
        block: (k, n) for the k-th of n equal blocks of rows.
        zero_last: whether the last third of the second source must be zero, because the leaf
            can't hold it.
    """

    leaf: str
    sources: tuple[str, ...]
    layout: Layout
    block: tuple[int, int] = (0, 1)
    zero_last: bool = False

    def torch_shape(self, shape: Shape) -> Shape:
        """The full shape of each source, for a leaf of `shape`."""
        rows = self.layout.torch_shape(shape)
        n = self.block[1]
        return (rows[0] * n, *rows[1:]) if n > 1 else rows

    def to_flax(self, tensors: Mapping[str, np.ndarray], shape: Shape) -> np.ndarray:
        """The leaf, of the given shape, from the module's tensors by name."""
        first, *others = (self._rows(tensors[source]) for source in self.sources)
        for other in others:
            first = first + other
        return self.layout.to_flax(first, shape)

    def __str__(self) -> str:
        words = []
        if len(self.sources) > 1:
            words.append("sum")
        if self.block[1] > 1:
            words.append(f"rows {self.block[0] + 1}/{self.block[1]}")
        layout = str(self.layout)
        if layout != "unchanged" or not words:
            words.append(layout)
        return ", ".join(words)

    def _rows(self, x: np.ndarray) -> np.ndarray:
        k, n = self.block
        size = x.shape[0] // n if n > 1 else 0
        return x[k * size : (k + 1) * size] if n > 1 else x


def to_torch(parts: Sequence[Part], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The PyTorch tensors of a layer from its Flax leaves.

    A sum of two biases is written as the first. The second becomes negative zeros, since adding
    -0.0 leaves every value unchanged, bit for bit.
    """
    blocks: dict[str, dict[int, np.ndarray]] = {}
    for part in parts:
        rows = part.layout.to_torch(leaves[part.leaf])
        first, *others = part.sources
        blocks.setdefault(first, {})[part.block[0]] = rows
        for other in others:
            blocks.setdefault(other, {})[part.block[0]] = np.full_like(rows, -0.0)
    return {
        name: np.ascontiguousarray(
            rows[0] if len(rows) == 1 else np.concatenate([rows[k] for k in sorted(rows)])
        ).reshape(_total(rows))
        for name, rows in blocks.items()
    }


def _total(blocks: Mapping[int, np.ndarray]) -> Shape:
    # `ascontiguousarray` would turn a scalar into a vector.
    first = next(iter(blocks.values()))
    return (
        first.shape
        if len(blocks) == 1
        else (sum(b.shape[0] for b in blocks.values()), *first.shape[1:])
    )


# One function per layer type, from the paths of its leaves to its parts.


def linear(leaves: Sequence[str], *, in_axes: int = 1, channels: int = 1) -> list[Part]:
    """`torch.nn.Linear`."""
    return _weight_and_bias(leaves, Matrix(in_axes, channels))


def conv(leaves: Sequence[str], *, flipped: bool = False) -> list[Part]:
    """`torch.nn.Conv1d`, `2d`, `3d`, and transposed."""
    return _weight_and_bias(leaves, Kernel(flipped))


def norm(leaves: Sequence[str], *, channels: int = 1) -> list[Part]:
    """`torch.nn.BatchNorm`, `LayerNorm`, `GroupNorm`, `InstanceNorm`, `RMSNorm`."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return [Part(leaf, (names[leaf],), Vector(channels)) for leaf in leaves if leaf in names]


def embedding(leaves: Sequence[str]) -> list[Part]:
    """`torch.nn.Embedding`."""
    return [Part(leaf, ("weight",), Same()) for leaf in leaves if leaf == "embedding"]


def same(leaves: Sequence[str]) -> list[Part]:
    """A custom layer that stores its weight in Flax's layout, as GPT-2's `Conv1D` does."""
    return _weight_and_bias(leaves, Same())


def attention(leaves: Sequence[str], *, separate: bool = False) -> list[Part]:
    """`torch.nn.MultiheadAttention`; `separate` if keys have their own width (`kdim`)."""
    parts = []
    for k, name in enumerate(("query", "key", "value")):
        weight, block = (
            ("in_proj_weight", (k, 3)) if not separate else (f"{name[0]}_proj_weight", (0, 1))
        )
        parts.append(Part(f"{name}/kernel", (weight,), Matrix(), block))
        parts.append(Part(f"{name}/bias", ("in_proj_bias",), Vector(), (k, 3)))
    parts.append(Part("out/kernel", ("out_proj.weight",), Matrix(in_axes=2)))
    parts.append(Part("out/bias", ("out_proj.bias",), Vector()))
    return [part for part in parts if part.leaf in leaves]


_BIASES = ("bias_ih", "bias_hh")


def cell(leaves: Sequence[str], gates: str) -> list[Part]:
    """`torch.nn.LSTM` (gates `ifgo`), `GRU` (`rzn`), `RNN` (no gates) and their cells.

    Flax has two forms of each: fused, with all gates in one kernel (`dense_i`, `dense_h`), or
    with one kernel per gate (`ii`, `hi`, ...).
    """
    if "dense_i/kernel" in leaves:
        return _fused_cell(leaves, gates)
    n = max(len(gates), 1)
    parts = []
    for k, gate in enumerate(gates or ("",)):
        # `if` is a keyword, so the attribute of the NNX cell is `if_`.
        inner = f"i{gate}_" if f"i{gate}_/kernel" in leaves else f"i{gate}"
        outer = f"h{gate}"
        parts.append(Part(f"{inner}/kernel", ("weight_ih",), Matrix(), (k, n)))
        parts.append(Part(f"{outer}/kernel", ("weight_hh",), Matrix(), (k, n)))
        biased = [f"{name}/bias" for name in (inner, outer) if f"{name}/bias" in leaves]
        if len(biased) == 2:
            parts += [Part(b, (s,), Vector(), (k, n)) for b, s in zip(biased, _BIASES, strict=True)]
        else:
            parts += [Part(b, _BIASES, Vector(), (k, n)) for b in biased]
    return [part for part in parts if part.leaf in leaves]


def _fused_cell(leaves: Sequence[str], gates: str) -> list[Part]:
    parts = [
        Part("dense_i/kernel", ("weight_ih",), Matrix()),
        Part("dense_h/kernel", ("weight_hh",), Matrix()),
    ]
    biased = [leaf for leaf in ("dense_i/bias", "dense_h/bias") if leaf in leaves]
    if len(biased) == 2:
        return parts + [Part(b, (s,), Vector()) for b, s in zip(biased, _BIASES, strict=True)]
    # The GRU's new gate is tanh(W x + b_in + r * (U h + b_hn)): r multiplies b_hn, so no sum of
    # biases can hold it.
    return parts + [Part(b, _BIASES, Vector(), zero_last=gates == "rzn") for b in biased]


def _weight_and_bias(leaves: Sequence[str], layout: Layout) -> list[Part]:
    parts = [Part("kernel", ("weight",), layout), Part("bias", ("bias",), Vector())]
    return [part for part in parts if part.leaf in leaves]
