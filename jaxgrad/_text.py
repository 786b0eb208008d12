"""The words that errors and tables share: how leaves, sizes and near misses are written."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp


def spec(x: Any) -> str:
    """Dtype and shape of an array, a number or a `ShapeDtypeStruct`: `float32[3,2]`."""
    return f"{_dtype(x)}[{','.join(map(str, getattr(x, 'shape', ())))}]"


def numel(x: Any) -> int:
    """How many numbers an array holds; PyTorch's `Tensor.numel`."""
    return math.prod(getattr(x, "shape", ()))


def nbytes(x: Any) -> int:
    """The bytes that an array takes."""
    return numel(x) * _dtype(x).itemsize


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


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


def count(items: Sequence[Any], noun: str, *, verb: bool = True) -> str:
    """`1 leaf is`, `3 leaves are`."""
    plural = noun[:-1] + "ves" if noun.endswith("leaf") else noun + "s"
    words = f"{len(items)} {noun if len(items) == 1 else plural}"
    return words + (" is" if len(items) == 1 else " are") * verb


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def nearest(word: str, candidates: Iterable[str], most: int = 3) -> list[str]:
    """The candidates that a mistyped word may have meant, best first."""
    return difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=most, cutoff=0.6)


def table(rows: Iterable[Sequence[str]], indent: str = "") -> list[str]:
    """One line of text per row, with the columns aligned to the left."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
