"""Builds arrays from storages: dtypes, strides, and the checks that keep a view inside its file.

A PyTorch tensor is a strided view of a storage, which is a span of bytes in the file. So is a NumPy
array over a memory map: nothing is copied, and unused pages are never read. NumPy has no lazy
conjugate or negative, so PyTorch's `conj` and `neg` bits are applied, once per storage.
"""

import dataclasses
import mmap
from collections.abc import Hashable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxgrad._disk.malformed import MAX_INT64, MalformedError, checked_int, shorten
from jaxgrad._disk.safetensors import MAX_RANK

MAX_EXPANDED_BYTES = 1 << 30

# Names as in `torch.<name>`.
DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
} | {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        *("float8_e8m0fnu", "complex32"),
    )
    if hasattr(ml_dtypes, name)
}

# The type names in storages' persistent ids. An untyped storage counts bytes.
STORAGE_DTYPES: Mapping[str, str] = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.UntypedStorage": "uint8",
    "torch.storage.UntypedStorage": "uint8",
}


@dataclasses.dataclass(slots=True, eq=False)
class Storage:
    """A span of the file's bytes; `start` is set once the container has been read."""

    key: str
    dtype: np.dtype[Any]
    nbytes: int
    start: int = -1


@dataclasses.dataclass(slots=True, eq=False)
class Tensor:
    """A checked, strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conj: bool = False
    neg: bool = False

    def memory(self) -> tuple[Hashable, ...]:
        """A key that tied tensors share."""
        start = self.storage.start + self.offset * self.dtype.itemsize
        return start, self.dtype, self.shape, self.strides, self.conj, self.neg


def make_tensor(
    storage: Storage,
    dtype: np.dtype[Any],
    offset: object,
    shape: object,
    strides: object,
    bits: object = None,
) -> Tensor:
    """A `Tensor`, if all its elements are inside `storage`.

    `bits` are PyTorch's tensor metadata: a dict with "conj" and "neg", or None.
    """
    if not isinstance(shape, (tuple, list)) or not isinstance(strides, (tuple, list)):
        kinds = f"{type(shape).__name__} and {type(strides).__name__}"
        raise MalformedError(f"shape and stride are {kinds}, expected tuples")
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        ranks = f"{len(shape)} and {len(strides)}"
        raise MalformedError(f"shape and stride of {ranks} dimensions, expected <= {MAX_RANK} each")
    itemsize = dtype.itemsize
    last = offset = checked_int(offset, "storage offset")
    numel = extent = 1
    for size, stride in zip(shape, strides, strict=True):
        last += (checked_int(size, "dimension") - 1) * checked_int(stride, "stride")
        numel *= size
        # NumPy multiplies the other dimensions even if one is zero.
        extent *= size or 1
        if max(extent, stride) * itemsize > MAX_INT64:
            raise MalformedError(f"shape {tuple(shape)} or stride {tuple(strides)} exceeds 2**63")
    capacity = storage.nbytes // itemsize
    if numel and last >= capacity:
        raise MalformedError(
            f"shape {tuple(shape)}, stride {tuple(strides)} and offset {offset} reach element "
            f"{last} of storage '{shorten(storage.key)}', which holds {capacity}"
        )
    if numel > capacity and numel * itemsize > MAX_EXPANDED_BYTES:
        raise MalformedError(
            f"shape {tuple(shape)} expands the {capacity} elements of storage "
            f"'{shorten(storage.key)}' to {numel * itemsize} bytes, over {MAX_EXPANDED_BYTES}"
        )
    conj, neg = _metadata(bits) if bits else (False, False)
    if (conj and "complex" not in dtype.name) or (neg and dtype.name == "bool"):
        raise MalformedError(f"dtype {dtype.name} has no {'conjugate' if conj else 'negative'}")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides), conj, neg)


def _metadata(bits: object) -> tuple[bool, bool]:
    if not isinstance(bits, dict) or any(
        key not in ("conj", "neg") or type(bit) is not bool for key, bit in bits.items()
    ):
        raise MalformedError("tensor metadata other than the bits 'conj' and 'neg'")
    return bits.get("conj", False), bits.get("neg", False)


class Arrays:
    """Read-only arrays over one memory-mapped file."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._resolved: dict[tuple[Hashable, ...], np.ndarray] = {}

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor's elements, as a view of the file or of a resolved storage."""
        dtype, itemsize = tensor.dtype, tensor.dtype.itemsize
        if 0 in tensor.shape:
            empty = np.empty(tensor.shape, dtype)
            empty.flags.writeable = False
            return empty
        strides = [stride * itemsize for stride in tensor.strides]
        if tensor.conj or tensor.neg:
            buffer, start = self._resolve(tensor), 0
        else:
            buffer, start = self._data, tensor.storage.start
        offset = start + tensor.offset * itemsize
        array = np.ndarray(tensor.shape, dtype, buffer, offset, strides)
        array.flags.writeable = False
        return array

    def _resolve(self, tensor: Tensor) -> np.ndarray:
        storage, dtype = tensor.storage, tensor.dtype
        key = (storage.start, storage.nbytes, dtype, tensor.conj, tensor.neg)
        if key not in self._resolved:
            count = storage.nbytes // dtype.itemsize
            elements = np.ndarray((count,), dtype, self._data, storage.start)
            if tensor.conj:
                elements = np.conj(elements)
            self._resolved[key] = np.negative(elements) if tensor.neg else np.array(elements)
        return self._resolved[key]
