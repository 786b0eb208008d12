"""The safetensors container, and Hugging Face's index over several files.

The header is JSON, so it is parsed here: the safetensors package's NumPy loader knows no 8-bit
floats. Format: https://huggingface.co/docs/safetensors, whose rules are enforced: the tensors
cover the data without holes or overlaps, and each is as long as its shape says.
"""

import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxgrad.torch._reading.errors import MalformedError, shorten
from jaxgrad.torch._reading.module import Contents
from jaxgrad.torch._reading.tensors import (
    DTYPES,
    MAX_RANK,
    Storage,
    Tensor,
    checked_int,
    make_tensor,
)

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise MalformedError("the JSON names this twice", shorten(key))
        made[key] = value
    return made


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


def load_safetensors(data: mmap.mmap) -> Contents:
    """The tensors and the metadata of a safetensors file."""
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
    found = Contents(values={k: v for k, v in metadata.items() if isinstance(v, str)})
    for name, fields in header.items():
        try:
            found.tensors[name] = _tensor(fields, 8 + length, len(data))
        except MalformedError as error:
            raise MalformedError(error.reason, shorten(name)) from None
    _check_cover(found.tensors, 8 + length, len(data))
    return found


def _tensor(fields: Any, base: int, end: int) -> Tensor:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError("expected exactly dtype, shape and data_offsets")
    dtype_name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        reason = f"dtype {shorten(str(dtype_name))} is not readable; readable: {', '.join(_DTYPES)}"
        raise MalformedError(reason)
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise MalformedError("shape and data_offsets must be lists, the latter of two")
    if len(shape) > MAX_RANK:
        raise MalformedError(f"a shape of {len(shape)} dimensions, at most {MAX_RANK} are possible")
    dtype = DTYPES[_DTYPES[dtype_name]]
    start, stop = (checked_int(offset, "data offset") for offset in offsets)
    shape = tuple(checked_int(size, "dimension") for size in shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes or base + stop > end:
        raise MalformedError(
            f"bytes {start} to {stop} of {end - base} for shape {shape} of {dtype}, "
            f"which takes {nbytes}"
        )
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return make_tensor(Storage("", dtype, nbytes, base + start), dtype, 0, shape, strides)


def _check_cover(tensors: Mapping[str, Tensor], base: int, end: int) -> None:
    at = base
    spans = {
        name: (tensor.storage.start, tensor.storage.nbytes) for name, tensor in tensors.items()
    }
    for name, (start, nbytes) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at:
            fault = "overlaps another tensor" if start < at else "leaves a hole before it"
            raise MalformedError(fault, shorten(name))
        at = start + nbytes
    if at != end:
        raise MalformedError(f"{end - at} bytes after the last tensor")


def read_index(index: Mapping[str, Any], folder: pathlib.Path) -> dict[str, list[str]]:
    """The weight names of each file of a sharded checkpoint, in the index' order.

    Args:
        index: the parsed `*.index.json`.
        folder: where it lies; its files lie beside it.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise MalformedError("has no object `weight_map` of weights to files")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0:"):
            raise MalformedError("its file is not a plain name beside the index", shorten(name))
        if file.endswith(".json"):
            raise MalformedError("its file is itself an index", shorten(name))
        shards.setdefault(file, []).append(name)
    # Asking for a hostile name could fail in ways of the file system's own.
    present = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    for file in shards:
        if file not in present:
            raise MalformedError("this file of the index is missing beside it", shorten(file))
    return shards
