"""The words that errors and tables share: how to write leaves, sizes and near misses."""

import difflib
import math
from collections.abc import Iterable, Sequence, Sized
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Leaf: TypeAlias = ArrayLike | jax.ShapeDtypeStruct


def spec(x: Leaf) -> str:
    """Dtype and shape of an array, a number or a `ShapeDtypeStruct`: `float32[3,2]`."""
    return f"{_dtype(x)}[{','.join(map(str, getattr(x, 'shape', ())))}]"


def numel(x: Leaf) -> int:
    """The number of elements of an array; PyTorch's `Tensor.numel`."""
    return math.prod(getattr(x, "shape", ()))


def nbytes(x: Leaf) -> int:
    """The size of an array in bytes."""
    return numel(x) * _dtype(x).itemsize


def _dtype(x: Leaf) -> np.dtype:
    dtype = getattr(x, "dtype", None)
    return jnp.result_type(x) if dtype is None else dtype


def si(n: float, unit: str = "") -> str:
    """A number to three digits with an SI prefix: `12.8k`, with a unit `12.8 kB`."""
    n, prefix = float(f"{n:.3g}"), ""  # rounded first: 999,999 is 1M, not 1e+03k
    for larger in "kMGTPE":
        if n < 1000:
            break
        n, prefix = n / 1000, larger
    return f"{n:.3g} {prefix}{unit}" if unit else f"{n:.3g}{prefix}"


def size(n: float) -> str:
    """A number of bytes: `812 B`, `10.3 kB`, `2.15 GB`."""
    return si(n, "B")


def work(n: float) -> str:
    """A number of floating point operations: `12 FLOP`, `3.1 MFLOP`."""
    return si(n, "FLOP")


def count(items: Sized, noun: str, *, verb: bool = True) -> str:
    """`1 leaf is`, `3 leaves are`."""
    plural = noun[:-1] + "ves" if noun.endswith("leaf") else noun + "s"
    words = f"{len(items)} {noun if len(items) == 1 else plural}"
    return words + (" is" if len(items) == 1 else " are") * verb


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first few items, and how many more there are."""
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def nearest(word: str, candidates: Iterable[str], most: int = 3) -> list[str]:
    """The candidates closest to a mistyped word, best first."""
    return difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=most, cutoff=0.6)


def table(rows: Iterable[Sequence[str]], indent: str = "") -> list[str]:
    """One line of text per row, with the columns aligned to the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
