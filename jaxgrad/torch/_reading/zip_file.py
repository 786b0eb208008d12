"""The zip container of `torch.save` since PyTorch 1.6: a pickle and one stored entry per storage.

Entries are parsed here because `zipfile` on Python 3.11 lets entries overlap: a file of a few
megabytes then unpacks to petabytes. PyTorch stores its entries uncompressed, which makes memory
mapping possible; a compressed entry is refused.

The pickle's checksum is always verified. Storages of up to `EAGER_CRC_BYTES` are verified on
opening, and all of them only on request, since that reads the whole file.
"""

import dataclasses
import mmap
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad.torch._reading.torch_globals import REBUILD, load_storage
from jaxgrad.torch._reading.unpickler import MAX_PICKLE_BYTES, Machine

MAX_DIRECTORY_BYTES = 1 << 26
EAGER_CRC_BYTES = 1 << 14

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_UNKNOWN = 0xFFFFFFFF  # the value is in the zip64 field
_ENCRYPTED = 1


@dataclasses.dataclass(slots=True)
class Entry:
    """A central directory record, with the position of its bytes in the file."""

    name: str
    flags: int
    method: int
    crc: int
    compressed: int
    size: int
    header: int
    start: int = 0


def _unpack(fields: struct.Struct, data: mmap.mmap, at: int, signature: bytes) -> tuple[Any, ...]:
    if at < 0 or at + fields.size > len(data):
        raise MalformedError("the file ends inside a zip record: it is truncated")
    record = fields.unpack_from(data, at)
    if record[0] != signature:
        raise MalformedError(
            f"no zip record {signature[2:].hex()} at byte {at}: the file is damaged"
        )
    return record


def _directory(data: mmap.mmap) -> tuple[int, int, int]:
    """The central directory's start, its end, and its number of entries."""
    # The record is at the end, followed by a comment of at most 65535 bytes.
    at = data.rfind(b"PK\5\6", max(0, len(data) - _END.size - 0xFFFF))
    if at < 0:
        raise MalformedError("no zip directory at the end of the file: it is truncated")
    _, disk, first_disk, _, count, size, start, comment = _unpack(_END, data, at, b"PK\5\6")
    if at + _END.size + comment != len(data):
        raise MalformedError("bytes after the end of the zip directory")
    end = at
    locator = at - _END64_LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        _, _, end, _ = _unpack(_END64_LOCATOR, data, locator, b"PK\6\7")
        _, _, _, _, disk, first_disk, _, count, size, start = _unpack(_END64, data, end, b"PK\6\6")
    if disk or first_disk:
        raise MalformedError("a zip file in several parts")
    if size > MAX_DIRECTORY_BYTES or count * _CENTRAL.size > size:
        raise MalformedError(f"a zip directory of {size} bytes for {count} entries")
    if start + size != end:
        raise MalformedError(f"the zip directory should end at byte {end}, not {start + size}")
    return start, end, count


def _zip64(extra: bytes, values: list[int]) -> list[int]:
    """`values`, with the unknown ones taken in order from the extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = list(
                struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4)
            )
            if len(wide) < values.count(_UNKNOWN):
                raise MalformedError("a zip64 field is too short")
            return [wide.pop(0) if value == _UNKNOWN else value for value in values]
        at += 4 + length
    return values


def read_entries(data: mmap.mmap) -> dict[str, Entry]:
    """The entries by name, in file order: unique, inside the file, and not overlapping."""
    at, end, count = _directory(data)
    limit = at
    entries: dict[str, Entry] = {}
    for _ in range(count):
        record = _unpack(_CENTRAL, data, at, b"PK\1\2")
        flags, method, crc, compressed, size = record[3], record[4], *record[7:10]
        name_length, extra_length, comment_length, header = *record[10:13], record[16]
        at += _CENTRAL.size
        name = data[at : at + name_length].decode("utf-8", "replace")
        extra = data[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if at > end:
            raise MalformedError("the zip directory is longer than declared")
        if _UNKNOWN in (size, compressed, header):
            size, compressed, header = _zip64(extra, [size, compressed, header])
        if name in entries:
            raise MalformedError("the zip holds two entries of this name", shorten(name))
        entries[name] = Entry(name, flags, method, crc, compressed, size, header)
    if at != end:
        raise MalformedError("the zip directory is shorter than declared")
    _locate(data, entries, limit)
    return entries


def _locate(data: mmap.mmap, entries: Mapping[str, Entry], limit: int) -> None:
    """Sets where each entry's bytes start, and checks that entries do not overlap."""
    free = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.header):
        if entry.header < free:
            raise MalformedError("overlaps another zip entry", shorten(entry.name))
        record = _unpack(_LOCAL, data, entry.header, b"PK\3\4")
        name_at = entry.header + _LOCAL.size
        entry.start = name_at + record[9] + record[10]
        free = entry.start + entry.compressed
        if free > limit:
            raise MalformedError("reaches past the zip directory: truncated", shorten(entry.name))
        name = data[name_at : name_at + record[9]].decode("utf-8", "replace")
        if name != entry.name:
            raise MalformedError(f"its own header names it '{shorten(name)}'", shorten(entry.name))


def _checked(data: mmap.mmap, entry: Entry) -> None:
    if entry.size <= EAGER_CRC_BYTES:
        crc = zlib.crc32(data[entry.start : entry.start + entry.size])
    else:
        with memoryview(data) as whole, whole[entry.start : entry.start + entry.size] as span:
            crc = zlib.crc32(span)
    if crc != entry.crc:
        raise MalformedError(
            f"is damaged: its checksum is {crc:08x}, but the zip records {entry.crc:08x}",
            shorten(entry.name),
        )


def _stored(entries: Mapping[str, Entry], name: str) -> Entry:
    entry = entries.get(name)
    if entry is None:
        raise MalformedError("this entry is missing from the zip", shorten(name))
    if entry.flags & _ENCRYPTED:
        raise MalformedError("is encrypted", shorten(name))
    if entry.method != 0 or entry.compressed != entry.size:
        raise MalformedError(
            "is compressed, which torch.save never does; unzip the file and zip it with `zip -0`",
            shorten(name),
        )
    return entry


def _root(entries: Mapping[str, Entry]) -> str:
    """The folder, with its slash, that holds `data.pkl`."""
    names = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    names = [name for name in names if name.count("/") <= 1]
    if len(names) != 1:
        raise MalformedError(
            f"a zip with {len(names)} `data.pkl` at its top, expected one: not of torch.save"
        )
    return names[0].removesuffix("data.pkl")


def load_zip(data: mmap.mmap, checksums: bool) -> Any:
    """The object graph of a zip file, with storages placed in `data`.

    Args:
        data: the whole file.
        checksums: whether to verify storages of any size.
    """
    entries = read_entries(data)
    root = _root(entries)
    if f"{root}constants.pkl" in entries:
        raise MalformedError(
            "a TorchScript archive (torch.jit.save) holds a program, not a checkpoint; save "
            "`model.state_dict()` with torch.save"
        )
    pickle = _stored(entries, f"{root}data.pkl")
    if pickle.size > MAX_PICKLE_BYTES:
        raise MalformedError(
            f"a pickle of {pickle.size} bytes, at most {MAX_PICKLE_BYTES} are read"
        )
    # `torch.serialization.set_crc32_options(False)` writes zeros.
    has_checksums = pickle.crc != 0
    if checksums and not has_checksums:
        raise MalformedError("the file was saved without checksums")
    if has_checksums:
        _checked(data, pickle)
    order = entries.get(f"{root}byteorder")
    if order is not None and data[order.start : order.start + min(order.size, 8)] != b"little":
        raise MalformedError("not written on a little-endian machine; save it there as safetensors")
    placed: set[str] = set()

    def place(key: str, nbytes: int) -> int:
        name = f"{root}data/{key}"
        entry = _stored(entries, name)
        if entry.size < nbytes:
            reason = f"holds {entry.size} bytes, but its tensors need {nbytes}: truncated"
            raise MalformedError(reason, shorten(name))
        if name not in placed:
            placed.add(name)
            if checksums or (has_checksums and entry.size <= EAGER_CRC_BYTES):
                _checked(data, entry)
        return entry.start

    def persistent_load(pid: tuple[Any, ...]) -> Any:
        if pid[0] != "storage":
            raise MalformedError(f"a persistent id of kind '{shorten(pid[0])}', expected 'storage'")
        return load_storage(pid[1:], place)

    try:
        content = data[pickle.start : pickle.start + pickle.size]
        return Machine(REBUILD, persistent_load).load(content)[0]
    except MalformedError as error:
        raise MalformedError(error.reason, error.entry or pickle.name) from None
