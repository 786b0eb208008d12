"""Digests of arrays over bytes and meaning: path, dtype and shape count like the bytes.

The same bytes under another name or of another shape are other content. A `checksum` finds damage
and is fast. A `content_name` tells contents apart: equal names mean equal arrays.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import jax
import numpy as np

from jaxgrad._disk.safetensors import raw

Array: TypeAlias = np.ndarray | jax.Array

ROWS_AT_A_TIME = 4096  # a dataset may not fit into host memory


def checksum(path: str, x: Array) -> int:
    """The CRC-32 of an array: 1.6 GB/s on one core, where SHA-256 reaches 0.9."""
    crc = 0
    for piece in _pieces(path, x):
        crc = zlib.crc32(piece, crc)
    return crc


def text_checksum(text: str) -> int:
    """The CRC-32 of a text."""
    return zlib.crc32(text.encode())


def content_name(parts: Iterable[str | tuple[str, Array]]) -> str:
    """A name of 32 hexadecimal digits for texts and named arrays, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        pieces = [part.encode() + b"\0"] if isinstance(part, str) else _pieces(*part)
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()[:32]


def _pieces(path: str, x: Array) -> Iterator[bytes | memoryview]:
    yield f"{path} {x.dtype.name}{list(x.shape)}\0".encode()
    if x.shape and len(x) > ROWS_AT_A_TIME:
        for start in range(0, len(x), ROWS_AT_A_TIME):
            yield raw(x[start : start + ROWS_AT_A_TIME])
    else:
        yield raw(x)
