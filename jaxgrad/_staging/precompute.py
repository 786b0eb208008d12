"""Runs the frozen part over a dataset: in chunks, checked, and only once."""

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad._devices.progress import progress_bar
from jaxgrad._disk.digest import content_name
from jaxgrad._jaxpr.dataflow import taken
from jaxgrad._jaxpr.source import aval, whence
from jaxgrad._jaxpr.views import inner_consts
from jaxgrad._staging import features as _features
from jaxgrad._staging.encoding import decode, encode, is_encoded, squares
from jaxgrad._staging.split import Split
from jaxgrad._tree.bitwise import host
from jaxgrad._tree.flat import is_key


class StageError(ValueError):
    """A loss, dataset or features that staging can't handle; the message gives the reason."""

    __module__ = "jaxgrad"


class Frozen:
    """The frozen part as a function of the first row of a chunk of a dataset.

    Args:
        split: the split, traced for the rows of a chunk.
        values: the values of its frozen inputs.
        dataset: the parts of the dataset, as the batch has them.
        encoding: how to store floating point features.
        sharding: how to lay out the rows of a chunk on the mesh of the values.
    """

    def __init__(
        self,
        split: Split,
        values: Sequence[jax.Array | np.ndarray],
        dataset: Sequence[jax.Array | np.ndarray],
        encoding: str | None,
        sharding: NamedSharding | None = None,
    ) -> None:
        self.split, self.values, self.dataset = split, values, dataset
        self.jaxpr = split.features()
        self.encoding = encoding
        self.error = np.zeros(2)
        self.sharding = sharding
        # Each process needs all features: any row may be in its part of a later step.
        everywhere = sharding and NamedSharding(sharding.mesh, PartitionSpec())
        features = jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, []))
        compute = functools.partial(_compute, split, features, encoding)
        self.compute = jax.jit(compute, out_shardings=everywhere)

    def __call__(self, start: int) -> list[jax.Array]:
        """The arrays to store for the chunk that starts at this row."""
        stored, error = self.run(self.chunk(start))
        if self.encoding:  # reading the error waits for it
            self.error += np.asarray(error)
        return stored

    def run(self, chunk: Sequence[jax.Array | np.ndarray]) -> tuple[list[jax.Array], jax.Array]:
        """The arrays to store for some rows, and the error of encoding them."""
        if self.sharding is not None:
            chunk = [_laid(np.asarray(rows), self.sharding) for rows in chunk]
        return self.compute(*self.values, *chunk)

    def chunk(self, start: int) -> list[jax.Array | np.ndarray]:
        """The rows of the dataset that a chunk takes."""
        return [_rows(leaf, start, self.split.rows) for leaf in self.dataset]

    def specs(self, total: int) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the features of the complete dataset."""
        avals = [jax.ShapeDtypeStruct(aval(v).shape, aval(v).dtype) for v in self.jaxpr.invars]
        stored, _ = jax.eval_shape(self.compute, *avals)
        return [jax.ShapeDtypeStruct((total, *s.shape[1:]), s.dtype) for s in stored]

    def confirm(self) -> None:
        """Runs the first chunk's last rows again, at other positions among other rows.

        Raises:
            StageError: a row came out differently.
        """
        half = self.split.rows // 2
        if not half:
            return
        batch = self.chunk(0)
        moved = [np.concatenate([np.asarray(x)[-half:]] * 3)[: len(x)] for x in batch]
        alone, among = (iter(self.run(rows)[0]) for rows in (batch, moved))
        for var in self.split.computed:
            dtype = aval(var).dtype
            a, b = (np.asarray(decode(x, dtype, self.encoding)) for x in (alone, among))
            if not _close(a[-half:], b[:half], is_encoded(dtype, self.encoding)):
                eqn = next(e for e in self.split.program.jaxpr.eqns if var in e.outvars)
                raise StageError(
                    f"the frozen value {var.aval} from {eqn.primitive.name} at {whence(eqn)[0]} "
                    "changes when the same example stands among other examples, so it can't be "
                    "computed once per example. Does a custom operation mix the batch?"
                )

    def key(self) -> str:
        """A hash of everything that the features depend on."""
        text = re.sub(r"0x[0-9a-f]+", "", str(self.jaxpr))  # addresses of functions
        setup = [jax.__version__, version("jaxlib"), jax.default_backend()]
        setup += [str(self.encoding), str(self.split.rows)]
        used = taken(self.jaxpr)
        inputs = zip(self.jaxpr.invars, [*self.values, *self.dataset], strict=True)
        # The text of a program abbreviates the arrays that its inner programs close over.
        arrays = [*(x for v, x in inputs if v in used), *inner_consts(self.jaxpr)]
        return content_name([text, *setup, *((str(i), _plain(x)) for i, x in enumerate(arrays))])


def _compute(
    split: Split,
    features: Callable[..., Sequence[jax.Array]],
    encoding: str | None,
    *inputs: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """The arrays to store for a chunk, and the error of encoding them."""
    values = zip(split.computed, features(*inputs), strict=True)
    rows = [split.place(var).rows_first(x) for var, x in values]
    stored = [array for x in rows for array in encode(x, encoding)]
    error = jnp.zeros(2)
    for x in rows:
        if is_encoded(x.dtype, encoding):
            error += jnp.stack(squares(x, encoding))
    return stored, error


def _plain(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Turns a number or a key into an array; an array stays, since host memory may be too small."""
    return host(x) if is_key(x) or not np.ndim(x) else x


def _rows(leaf: jax.Array | np.ndarray, start: int, rows: int) -> jax.Array | np.ndarray:
    if isinstance(leaf, jax.Array):
        return jax.lax.dynamic_slice_in_dim(leaf, start, rows)  # one compilation for all chunks
    return np.asarray(leaf[start : start + rows])


def _laid(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def _close(a: np.ndarray, b: np.ndarray, encoded: bool) -> bool:
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        # Rounding decides ties: a sign or an argmax may flip if two numbers are nearly equal.
        return np.mean(a != b) <= 0.01
    # An int8 step is up to 1/127 of the largest magnitude, whichever way a tie is rounded.
    tolerance = 0.02 if encoded else 10 * float(jnp.finfo(a.dtype).eps) ** 0.5
    a, b = (np.asarray(x, np.complex128 if np.iscomplexobj(a) else np.float64) for x in (a, b))
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return False
    a, b = a[finite], b[finite]
    return not a.size or np.max(np.abs(a - b)) <= tolerance * max(np.max(np.abs(a)), 1e-30)


def prepare(
    frozen: Frozen, total: int, where: str | os.PathLike[str], budget: int | None, progress: bool
) -> tuple[tuple[Any, ...], _features.Stats]:
    """Runs the frozen part over all rows; returns the stored arrays and their statistics."""
    specs = frozen.specs(total)
    if not specs:
        return (), _features.Stats(str(where), 0, 0.0)
    rows = frozen.split.rows
    starts = [min(start, total - rows) for start in range(0, total, rows)]
    need = _features.nbytes(specs)
    place = place_for(where, need, budget)
    frozen.confirm()
    with progress_bar(len(starts), "frozen part", progress, transient=True) as advance:

        def compute(start: int) -> list[jax.Array]:
            values = frozen(start)
            advance(1, "frozen part")
            return values

        if place == "device":
            values = _features.on_device(specs, starts, compute)
        elif place == "host":
            values = _features.on_host(specs, starts, compute)
        else:
            folder = Path(place) / frozen.key()
            values = _features.on_disk(specs, starts, rows, compute, folder)
            place = str(folder)
    error = float(np.sqrt(frozen.error[0] / max(frozen.error[1], 1e-30)))
    return values, _features.Stats(place, need, error)


def place_for(where: str | os.PathLike[str], need: int, budget: int | None) -> str:
    """Where features of this size go: "device", "host" or a folder."""
    if where not in ("auto", "device", "host"):
        return os.fspath(where)
    on_cpu = jax.default_backend() == "cpu"
    if where == "auto":
        free = budget if budget is not None else _free(on_cpu) // 2
        if need <= free:
            return "device"
        if not on_cpu and need <= _free(host=True) // 2:
            return "host"
    elif budget is None or need <= budget:
        return str(where)
    limit = f"the budget is {budget:,}" if budget is not None else "there is not enough memory"
    raise StageError(
        f"the features take {need:,} bytes and {limit}. Keep them on disk "
        '(where="path/to/folder"), store them in fewer bits (features_dtype="bfloat16" or '
        '"int8"), or raise budget_bytes.'
    )


def _free(host: bool) -> int:
    stats = None if host else jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system: unknown
        return sys.maxsize
