"""Features: what the frozen part hands to the step, one row per example.

Features on the device, in host memory and on disk are indexed alike: `features[rows]` returns
arrays on the device. On disk they are files of some megabytes, each written under a temporary name
and renamed when complete: a killed preparation continues where it stopped, and an incomplete file
is never read.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgrad._disk.atomic import replacing
from jaxgrad._disk.safetensors import raw

Specs: TypeAlias = Sequence[jax.ShapeDtypeStruct]
Rows: TypeAlias = slice | int | Sequence[int] | np.ndarray | jax.Array
"""A slice, an index, or an array of indices."""
Value: TypeAlias = "jax.Array | np.ndarray | DiskArray"
"""One value of all examples, on the device, in host memory or on disk."""
Compute: TypeAlias = Callable[[int], Sequence[jax.Array]]
"""Maps the first row of a chunk to the chunk's values."""

BYTES_PER_FILE = 64 * 2**20


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["encoding", "stats"]
)
@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a dataset or a batch; `features[rows]` selects rows.

    Attributes:
        values: arrays whose leading axis counts the examples.
        encoding: how floating point features are stored: None (unchanged), "bfloat16", "int8".
        stats: the location and size of a dataset's features; None for a batch.
    """

    values: tuple[Any, ...]
    encoding: str | None = None
    stats: "Stats | None" = None

    def __len__(self) -> int:
        return len(self.values[0]) if self.values else 0

    def __getitem__(self, rows: Rows) -> "Features":
        return Features(tuple(_take(value, rows) for value in self.values), self.encoding)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{v.dtype}{list(v.shape)}" for v in self.values)
        return f"Features({arrays}{f', {self.stats}' if self.stats else ''})"


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics of prepared features.

    Attributes:
        where: "device", "host" or the folder.
        nbytes: the size of the computed features in bytes.
        error: the relative error of the encoding: the root mean square of the change over that of
            the features; 0 without an encoding.
    """

    where: str
    nbytes: int
    error: float

    def __str__(self) -> str:
        loss = f", relative error {self.error:.2g} by encoding" if self.error else ""
        return f"{self.nbytes:,} bytes in {self.where}{loss}"


def _take(value: Value, rows: Rows) -> jax.Array:
    if isinstance(value, jax.Array):
        return value[rows]
    if isinstance(rows, Tracer):
        raise TypeError(
            "features in host memory or on disk can't be indexed under jit: the rows are known "
            "only when it runs. Index before the jitted step, `step(params, features[rows])`, or "
            'prepare with where="device".'
        )
    rows = rows if isinstance(rows, slice) else np.asarray(rows)
    return jnp.asarray(np.asarray(value[rows]))


def nbytes(specs: Specs) -> int:
    """The size in bytes of arrays of these shapes."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in specs)


def on_device(specs: Specs, starts: Iterable[int], compute: Compute) -> tuple[Value, ...]:
    """Fills device arrays in place, chunk by chunk."""
    buffers = [jnp.zeros(s.shape, s.dtype) for s in specs]
    for start in starts:
        buffers = _fill(buffers, list(compute(start)), start)
    return tuple(buffers)


@functools.partial(jax.jit, donate_argnums=0)
def _fill(buffers, chunk, start):
    return [
        jax.lax.dynamic_update_slice_in_dim(buffer, values, start, 0)
        for buffer, values in zip(buffers, chunk, strict=True)
    ]


def on_host(specs: Specs, starts: Iterable[int], compute: Compute) -> tuple[Value, ...]:
    """Fills NumPy arrays, chunk by chunk."""
    arrays = [np.empty(s.shape, s.dtype) for s in specs]
    for start in starts:
        for array, values in zip(arrays, compute(start), strict=True):
            array[start : start + len(values)] = values
    return tuple(arrays)


def on_disk(
    specs: Specs, starts: Sequence[int], rows: int, compute: Compute, folder: Path
) -> tuple[Value, ...]:
    """Fills files in a folder, a few chunks each; keeps complete files.

    Args:
        specs: shape and dtype of each value over all examples.
        starts: first rows of the chunks; the last chunk may overlap the one before it.
        rows: rows per chunk.
        compute: maps the first row of a chunk to the chunk's values.
        folder: the folder, used for these files alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = specs[0].shape[0]
    per_row = nbytes(specs) // max(total, 1)
    chunks = max(1, BYTES_PER_FILE // max(per_row * rows, 1))
    layout = Layout(folder, total, chunks * rows, per_row)
    for file in range(math.ceil(total / layout.per_file)):
        if layout.complete(file):
            continue
        begin, end = layout.rows(file)
        arrays = [np.empty((end - begin, *s.shape[1:]), s.dtype) for s in specs]
        for start in starts[file * chunks : (file + 1) * chunks]:
            skip = max(begin - start, 0)
            for array, values in zip(arrays, compute(start), strict=True):
                array[start + skip - begin : start - begin + rows] = np.asarray(values)[skip:]
        layout.write(file, arrays)
    values, offset = [], 0
    for spec in specs:
        values.append(DiskArray(layout, spec.shape, np.dtype(spec.dtype), offset))
        offset += nbytes([spec]) // max(total, 1)
    return tuple(values)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Maps rows to files."""

    folder: Path
    total: int
    per_file: int
    bytes_per_row: int

    def path(self, file: int) -> Path:
        """The path of a file."""
        return self.folder / f"{file:06d}.bin"

    def rows(self, file: int) -> tuple[int, int]:
        """The rows of a file: the first, and the one after the last."""
        return file * self.per_file, min((file + 1) * self.per_file, self.total)

    def complete(self, file: int) -> bool:
        """Whether a file exists and has all its rows."""
        begin, end = self.rows(file)
        path = self.path(file)
        return path.exists() and path.stat().st_size == (end - begin) * self.bytes_per_row

    def write(self, file: int, arrays: Sequence[np.ndarray]) -> None:
        """Writes a file atomically."""
        with replacing(self.path(file)) as f:
            for array in arrays:
                f.write(raw(array))


@dataclasses.dataclass(frozen=True)
class DiskArray:
    """One value of all examples; in each file its rows follow those of the values before it.

    Attributes:
        layout: maps rows to files.
        shape: the shape over all examples.
        dtype: the stored dtype.
        offset: bytes per row of the values before it.
    """

    layout: Layout
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Rows) -> np.ndarray:
        index = np.arange(len(self))[rows]
        out = np.empty((*index.shape, *self.shape[1:]), self.dtype)
        files, inside = np.divmod(index, self.layout.per_file)
        for file in np.unique(files):
            here = files == file
            out[here] = self._mapped(int(file))[inside[here]]
        return out

    def _mapped(self, file: int) -> np.ndarray:
        begin, end = self.layout.rows(file)
        rows = end - begin
        return _map(self.layout.path(file), self.dtype, rows * self.offset, (rows, *self.shape[1:]))


@functools.lru_cache(maxsize=256)  # a process may hold a limited number of files open
def _map(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, dtype, "r", offset, shape)
