"""Writes a PyTorch state dict as `torch.save` does, without PyTorch.

The file is an uncompressed zip of raw little-endian bytes and a protocol-2 pickle. The pickle only
names PyTorch's functions, so writing it does not need PyTorch.
"""

import struct
import zipfile
from collections.abc import Mapping
from typing import IO

from jaxgrad._disk.safetensors import raw
from jaxgrad.torch._mapping.layouts import Array

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
# Newer dtypes have no storage class: the tensor itself carries the dtype.
_UNTYPED = {
    *("uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
DTYPES = {*_STORAGES, *_UNTYPED}
"""The dtypes that a state dict can hold."""

_ALIGNMENT = 64


def write_state_dict(file: IO[bytes], tensors: Mapping[str, Array]) -> None:
    """Writes a file as `torch.save(state_dict, file)` does; a repeated array is stored once."""
    keys: dict[int, str] = {}
    stored: dict[str, Array] = {}
    pickled = [b"\x80\x02}("]  # protocol 2, an empty dict, its items
    for name, x in tensors.items():
        key = keys.setdefault(id(x), str(len(keys)))
        stored[key] = x
        pickled += [_string(name), _tensor(x, key)]
    pickled.append(b"u.")  # set the items, stop
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _entry(archive, file, "archive/data.pkl", b"".join(pickled))
        _entry(archive, file, "archive/byteorder", b"little")
        for key, x in stored.items():
            _entry(archive, file, f"archive/data/{key}", raw(x))
        _entry(archive, file, "archive/version", b"3\n")


def _entry(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name)  # dated to the zip epoch: equal tensors make equal files
    large = len(data) >= zipfile.ZIP64_LIMIT
    header = file.tell() + 30 + len(name) + (20 if large else 0)
    # An extra field pads the header, so that the data is aligned for memory mapping.
    padding = -(header + 4) % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data)


# The pickle: `_rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())`, in opcodes.


def _tensor(x: Array, key: str) -> bytes:
    dtype = x.dtype.name
    typed = dtype in _STORAGES
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    storage = b"".join(
        [
            b"(" + _string("storage"),
            _global("torch", _STORAGES[dtype])
            if typed
            else _global("torch.storage", "UntypedStorage"),
            _string(key),
            _string("cpu"),
            _integer(x.size if typed else x.nbytes),
            b"tQ",  # a tuple; the storage of this id
        ]
    )
    return b"".join(
        [
            _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"),
            b"(" + storage + _integer(0),
            _tuple(x.shape),
            _tuple(strides[: x.ndim]),
            b"\x89" + _global("collections", "OrderedDict") + b")R",
            b"" if typed else _global("torch", dtype),
            b"tR",
        ]
    )


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
