"""Arrays in a safetensors file: a JSON header, and the raw little-endian bytes behind it.

The format's rules are enforced: the tensors cover the data without holes or overlaps, and each is
as long as its shape says. Format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from jaxgrad._disk.malformed import MalformedError, checked_int, shorten

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 64  # PyTorch's and NumPy's own limit

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "bool": "BOOL",
    **{
        f"{kind}{bits}": f"{kind[0].upper()}{bits}"
        for kind in ("int", "uint")
        for bits in (8, 16, 32, 64)
    },
}
"""The format's name of each dtype that it holds."""

_NAMED = {code: np.dtype(getattr(ml_dtypes, name, name)) for name, code in DTYPES.items()}


class Storable(Protocol):
    """What is written: an array of NumPy or JAX, or one that is made when it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def nbytes(self) -> int: ...


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtype: its dtype.
        shape: its shape.
        start: the offset of its bytes in the file.
        nbytes: its bytes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def array(self, data: mmap.mmap) -> np.ndarray:
        """The tensor as a read-only array over the file."""
        return np.ndarray(self.shape, self.dtype, data, self.start)


def read_header(data: mmap.mmap) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, in the order of its header, and its metadata.

    Raises:
        MalformedError: the file breaks a rule of the format.
    """
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MalformedError(f"a header of {length} bytes in a file of {len(data)}", "header")
    try:
        header = parse_json(data[8 : 8 + length])
    except MalformedError as error:
        raise MalformedError(error.reason, error.entry or "header") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise MalformedError(f"is a {type(metadata).__name__}, expected an object", "__metadata__")
    entries: dict[str, Entry] = {}
    for name, fields in header.items():
        try:
            entries[name] = _entry(fields, 8 + length, len(data))
        except MalformedError as error:
            raise MalformedError(error.reason, shorten(name)) from None
    _check_cover(entries, 8 + length, len(data))
    return entries, {k: v for k, v in metadata.items() if isinstance(v, str)}


def write(file: IO[bytes], arrays: Mapping[str, Storable], metadata: Mapping[str, str]) -> None:
    """Writes arrays in the order of the mapping, and holds one at a time in host memory."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, x in arrays.items():
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": DTYPES[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for x in arrays.values():
        file.write(raw(x))


def raw(array: ArrayLike | Storable) -> memoryview:
    """The bytes of an array, in native byte order."""
    x = np.ascontiguousarray(np.asarray(array)).reshape(-1)
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return x.view(np.uint8).data


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object whose names are unique."""
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise MalformedError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise MalformedError(f"not JSON: {shorten(str(error))}") from None
    if not isinstance(parsed, dict):
        raise MalformedError(f"its JSON is a {type(parsed).__name__}, expected an object")
    return parsed


def _unique(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, value in pairs:
        if key in made:
            raise MalformedError("the JSON names this twice", shorten(key))
        made[key] = value
    return made


def _entry(fields: object, base: int, end: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError("expected exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _NAMED:
        reason = f"dtype {shorten(str(code))} is not readable; readable: {', '.join(_NAMED)}"
        raise MalformedError(reason)
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise MalformedError("shape and data_offsets must be lists, the latter of two")
    if len(shape) > MAX_RANK:
        raise MalformedError(f"a shape of {len(shape)} dimensions, at most {MAX_RANK} are possible")
    dtype = _NAMED[code]
    start, stop = (checked_int(offset, "data offset") for offset in offsets)
    shape = tuple(checked_int(size, "dimension") for size in shape)
    # NumPy multiplies the other dimensions even if one is zero.
    checked_int(math.prod(filter(None, shape)) * dtype.itemsize, "size")
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes or base + stop > end:
        raise MalformedError(
            f"bytes {start} to {stop} of {end - base} for shape {shape} of {dtype}, "
            f"which takes {nbytes}"
        )
    return Entry(dtype, shape, base + start, nbytes)


def _check_cover(entries: Mapping[str, Entry], base: int, end: int) -> None:
    at = base
    spans = {name: (entry.start, entry.nbytes) for name, entry in entries.items()}
    for name, (start, nbytes) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at:
            fault = "overlaps another tensor" if start < at else "leaves a hole before it"
            raise MalformedError(fault, shorten(name))
        at = start + nbytes
    if at != end:
        raise MalformedError(f"{end - at} bytes after the last tensor")
