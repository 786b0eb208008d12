"""Reads safetensors files, and Hugging Face's index over several files."""

import math
import mmap
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad._disk.safetensors import Entry, read_header
from jaxgrad.torch._reading.module import Contents
from jaxgrad.torch._reading.tensors import Storage, Tensor, make_tensor


def load_safetensors(data: mmap.mmap) -> Contents:
    """The tensors and the metadata of a safetensors file."""
    entries, metadata = read_header(data)
    found = Contents(values=dict(metadata))
    found.tensors.update((name, _tensor(entry)) for name, entry in entries.items())
    return found


def _tensor(entry: Entry) -> Tensor:
    strides = tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))
    storage = Storage("", entry.dtype, entry.nbytes, entry.start)
    return make_tensor(storage, entry.dtype, 0, entry.shape, strides)


def read_index(index: Mapping[str, Any], folder: pathlib.Path) -> dict[str, list[str]]:
    """The weight names in each file of a sharded checkpoint, in the index's order.

    Args:
        index: the parsed `*.index.json`.
        folder: the folder of the index and its files.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise MalformedError("has no object `weight_map` from weights to files")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or set(file) & set("/\\\0:"):
            raise MalformedError("its file is not a plain file name", shorten(name))
        if file.endswith(".json"):
            raise MalformedError("its file is itself an index", shorten(name))
        shards.setdefault(file, []).append(name)
    # Looking up a hostile name could fail in ways specific to the file system.
    present = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    for file in shards:
        if file not in present:
            raise MalformedError(
                "the index lists this file, but it is missing from the folder", shorten(file)
            )
    return shards
