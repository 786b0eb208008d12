"""The container of `torch.save` before PyTorch 1.6: five pickles, then the storages' bytes.

Magic number, protocol, system information, the object, and the storages' keys; then each storage's
element count and bytes. There are no checksums, and no lengths: only parsing a pickle finds its
end.
"""

import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Any

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad.torch._reading.tensors import Storage
from jaxgrad.torch._reading.torch_globals import REBUILD, Unreadable, load_storage
from jaxgrad.torch._reading.unpickler import Machine

# The pickle of 0x1950a86a20f9469cfc6c, which identifies such a file.
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PROTOCOL = 1001


def load_legacy(data: mmap.mmap) -> Any:
    """The object graph of a legacy file, with storages placed in `data`."""
    loaded: dict[str, Storage] = {}

    def persistent_load(pid: tuple[Any, ...]) -> Any:
        return _persistent(loaded, pid)

    protocol, at = _load(data, len(MAGIC), "protocol")
    if protocol != _PROTOCOL:
        raise MalformedError(f"a legacy file of another protocol than {_PROTOCOL}", "protocol")
    system, at = _load(data, at, "system information")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MalformedError("not written on a little-endian machine", "system information")
    root, at = _load(data, at, "object", persistent_load)
    keys, at = _load(data, at, "storage keys")
    if not isinstance(keys, (list, tuple)):
        raise MalformedError(f"expected a list, got a {type(keys).__name__}", "storage keys")
    _place(data, at, keys, loaded)
    return root


def _refuse(pid: tuple[Any, ...]) -> Any:
    raise MalformedError("a persistent id outside of the object")


def _load(
    data: mmap.mmap, at: int, what: str, load: Callable[[tuple[Any, ...]], Any] = _refuse
) -> tuple[Any, int]:
    try:
        return Machine(REBUILD, load).load(data, at)
    except MalformedError as error:
        raise MalformedError(error.reason, error.entry or what) from None


def _persistent(loaded: dict[str, Storage], pid: tuple[Any, ...]) -> Any:
    kind, fields = pid[0], pid[1:]
    if kind == "module":
        # A module's class comes with its source code, which is not needed.
        if not fields:
            raise MalformedError("a module's persistent id without a class")
        return fields[0]
    if kind != "storage" or len(fields) != 5:
        raise MalformedError(f"a persistent id of kind '{shorten(kind)}', expected 'storage'")
    storage = load_storage(fields[:4], lambda key, nbytes: -1)
    if isinstance(storage, Unreadable):
        raise MalformedError(storage.reason, f"storage {shorten(str(fields[1]))}")
    root = loaded.setdefault(storage.key, storage)
    if root.dtype != storage.dtype or root.nbytes != storage.nbytes:
        raise MalformedError(f"storage '{shorten(root.key)}' is described in two ways")
    if fields[4] is not None:
        raise MalformedError("a storage that views another storage (PyTorch 0.3 or older)")
    return root


def _place(data: mmap.mmap, at: int, keys: Sequence[object], loaded: dict[str, Storage]) -> None:
    """Sets each storage's start, from the order of the keys."""
    for key in keys:
        storage = loaded.get(key) if isinstance(key, str) else None
        if storage is None or storage.start >= 0:
            raise MalformedError("a key without a storage, or a repeated one", "storage keys")
        name = f"storage {shorten(storage.key)}"
        if at + 8 > len(data):
            raise MalformedError("the file ends before this storage: it is truncated", name)
        (count,) = struct.unpack_from("<q", data, at)
        if count * storage.dtype.itemsize != storage.nbytes:
            raise MalformedError(
                f"has {count} elements of {storage.dtype}, but the object records another size",
                name,
            )
        storage.start = at + 8
        at = storage.start + storage.nbytes
        if at > len(data):
            raise MalformedError("the file ends inside this storage: it is truncated", name)
    missing = [key for key, storage in loaded.items() if storage.start < 0]
    if missing:
        raise MalformedError(
            "the file has no bytes for this storage", f"storage {shorten(missing[0])}"
        )
