"""The opcodes that picklers write in protocols 2 to 5, and how each encodes its argument.

The standard `pickletools.genops` decodes them too, but took more than half of the time to read a
state dict with thousands of tensors; here an opcode is one table look-up. The text opcodes of
protocols 0 and 1 are absent (a persistent id needs protocol 2), as are `EXT*`, `INST`, `OBJ` and
`NEXT_BUFFER`, which `torch.save` never writes.

An argument truncated by the end of the data decodes to something too short. No STOP can follow it,
so the pickle is refused anyway.
"""

import mmap
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxgrad._disk.malformed import MalformedError

MAX_INT_BITS = 1024
MAX_NAME_LENGTH = 1024
_INT32 = struct.Struct("<i")
_FLOAT64 = struct.Struct(">d")

Bytes = bytes | mmap.mmap
Decode = Callable[[Bytes, int, int], tuple[Any, int]]  # data, at, end -> argument, next


class Opcode(NamedTuple):
    """An opcode's name in the pickle protocol, and its argument's decoder, if it has one.

    A constant is its own argument.
    """

    name: str
    decode: Decode | None = None


def _constant(value: object) -> Decode:
    return lambda data, at, end: (value, at)


def _fresh(make: Callable[[], Any]) -> Decode:
    return lambda data, at, end: (make(), at)


def _uint1(data: Bytes, at: int, end: int) -> tuple[int, int]:
    return data[at], at + 1


def _uint(size: int) -> Decode:
    return lambda data, at, end: (int.from_bytes(data[at : at + size], "little"), at + size)


def _int4(data: Bytes, at: int, end: int) -> tuple[int, int]:
    return _INT32.unpack_from(data, at)[0], at + 4


def _float8(data: Bytes, at: int, end: int) -> tuple[float, int]:
    return _FLOAT64.unpack_from(data, at)[0], at + 8


def _decimal(data: Bytes, at: int, end: int) -> tuple[int, int]:
    # Python 2 writes integers of 33 to 64 bits as decimals.
    newline = data.find(b"\n", at, at + 24)
    return int(data[at : max(newline, at)]), newline + 1


def _global(data: Bytes, at: int, end: int) -> tuple[tuple[str, str], int]:
    lines = data[at : min(at + MAX_NAME_LENGTH, end)].split(b"\n", 2)
    if len(lines) < 3:
        raise MalformedError(f"a global's name has more than {MAX_NAME_LENGTH} bytes")
    module, name, _ = lines
    return (module.decode(), name.decode()), at + len(module) + len(name) + 2


def _counted(prefix: int, convert: Callable[[bytes], Any]) -> Decode:
    """Decodes a length of `prefix` bytes, then that many bytes with `convert`."""

    def decode(data: Bytes, at: int, end: int) -> tuple[Any, int]:
        start = at + prefix
        stop = start + int.from_bytes(data[at:start], "little")
        if stop > end:
            raise MalformedError("the pickle ends inside an argument")
        return convert(data[start:stop]), stop

    return decode


def _integer(encoded: bytes) -> int:
    if len(encoded) * 8 > MAX_INT_BITS:
        raise MalformedError(f"an integer of {len(encoded) * 8} bits, at most {MAX_INT_BITS}")
    return int.from_bytes(encoded, "little", signed=True)


def _text(encoded: bytes) -> str:
    return encoded.decode("utf-8")


def _python2_text(encoded: bytes) -> str:
    return encoded.decode("latin-1")


OPCODES: Mapping[int, Opcode] = {
    ord(code): opcode
    for code, opcode in {
        "\x80": Opcode("PROTO", _uint1),
        "\x95": Opcode("FRAME", _uint(8)),
        "N": Opcode("NONE", _constant(None)),
        "\x88": Opcode("NEWTRUE", _constant(True)),
        "\x89": Opcode("NEWFALSE", _constant(False)),
        "I": Opcode("INT", _decimal),
        "J": Opcode("BININT", _int4),
        "K": Opcode("BININT1", _uint1),
        "M": Opcode("BININT2", _uint(2)),
        "\x8a": Opcode("LONG1", _counted(1, _integer)),
        "\x8b": Opcode("LONG4", _counted(4, _integer)),
        "G": Opcode("BINFLOAT", _float8),
        "X": Opcode("BINUNICODE", _counted(4, _text)),
        "\x8c": Opcode("SHORT_BINUNICODE", _counted(1, _text)),
        "\x8d": Opcode("BINUNICODE8", _counted(8, _text)),
        "T": Opcode("BINSTRING", _counted(4, _python2_text)),
        "U": Opcode("SHORT_BINSTRING", _counted(1, _python2_text)),
        "B": Opcode("BINBYTES", _counted(4, bytes)),
        "C": Opcode("SHORT_BINBYTES", _counted(1, bytes)),
        "\x8e": Opcode("BINBYTES8", _counted(8, bytes)),
        "\x96": Opcode("BYTEARRAY8", _counted(8, bytes)),
        ")": Opcode("EMPTY_TUPLE", _constant(())),
        "\x85": Opcode("TUPLE1"),
        "\x86": Opcode("TUPLE2"),
        "\x87": Opcode("TUPLE3"),
        "t": Opcode("TUPLE"),
        "]": Opcode("EMPTY_LIST", _fresh(list)),
        "l": Opcode("LIST"),
        "a": Opcode("APPEND"),
        "e": Opcode("APPENDS"),
        "}": Opcode("EMPTY_DICT", _fresh(dict)),
        "d": Opcode("DICT"),
        "s": Opcode("SETITEM"),
        "u": Opcode("SETITEMS"),
        "\x8f": Opcode("EMPTY_SET", _fresh(set)),
        "\x90": Opcode("ADDITEMS"),
        "\x91": Opcode("FROZENSET"),
        "(": Opcode("MARK"),
        "0": Opcode("POP"),
        "1": Opcode("POP_MARK"),
        "q": Opcode("BINPUT", _uint1),
        "r": Opcode("LONG_BINPUT", _uint(4)),
        "\x94": Opcode("MEMOIZE"),
        "h": Opcode("BINGET", _uint1),
        "j": Opcode("LONG_BINGET", _uint(4)),
        "c": Opcode("GLOBAL", _global),
        "\x93": Opcode("STACK_GLOBAL"),
        "R": Opcode("REDUCE"),
        "\x81": Opcode("NEWOBJ"),
        "\x92": Opcode("NEWOBJ_EX"),
        "b": Opcode("BUILD"),
        "Q": Opcode("BINPERSID"),
        ".": Opcode("STOP"),
    }.items()
}
