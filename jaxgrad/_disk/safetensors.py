"""Arrays in a safetensors file: a JSON header, and the raw little-endian bytes behind it.

The library of that name neither writes NumPy's 8-bit floats nor lets a large file go out array by
array. Format: https://huggingface.co/docs/safetensors.
"""

import json
import struct
from collections.abc import Mapping
from typing import IO, Any

import numpy as np

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
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


def write(file: IO[bytes], arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes arrays in the order of the mapping, each read to the host in its turn."""
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


def raw(x: Any) -> memoryview:
    """The bytes of an array, in the machine's order of them."""
    x = np.ascontiguousarray(np.asarray(x)).reshape(-1)
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    return x.view(np.uint8).data
