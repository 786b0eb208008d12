"""A pickle machine that builds data and runs nothing.

`pickle.Unpickler` with an allow-list cannot be made safe: a deep tuple as a dict key overflows
the C stack, and BUILD sets attributes of whatever an allowed global names. So this module
interprets the opcodes: a global is an inert name, a call of a global outside the table in
`torch_globals` is an inert `Object`, and only scalars and short flat tuples can be keys.

Every opcode takes bounded time and memory (none copies what a memo entry can repeat), so the
number of opcodes, which is limited, bounds the cost of a pickle.
"""

import dataclasses
import struct
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad.torch._reading.opcodes import MAX_NAME_LENGTH, OPCODES, Bytes, Decode

MAX_PICKLE_BYTES = 1 << 28
MAX_OPCODES = 8_000_000  # ~32 opcodes per tensor
MAX_KEY_LENGTH = 16
# Integer hashes are not salted: crafted keys make a dict quadratic. String hashes are salted.
MAX_NON_STRING_KEYS = 1 << 17
_UINT32 = struct.Struct("<I")
_BINGET, _LONG_BINPUT, _BININT1, _EMPTY_TUPLE = b"hrK)"
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; never imported."""

    name: str


@dataclasses.dataclass(slots=True, eq=False)
class Object:
    """An inert record of a global's call: its class, arguments and contents."""

    cls: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | None = None


Rebuild = Callable[["Machine", tuple[Any, ...]], Any]


class Machine:
    """Interprets one pickle.

    Args:
        rebuild: functions that carry out calls, by the name of the global called.
        persistent_load: returns the object of a persistent id, a tuple.
    """

    def __init__(
        self, rebuild: Mapping[str, Rebuild], persistent_load: Callable[[tuple[Any, ...]], Any]
    ):
        self._rebuild = rebuild
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = MAX_OPCODES
        self._keys_left = MAX_NON_STRING_KEYS

    def load(self, data: Bytes, at: int = 0) -> tuple[Any, int]:
        """Returns the object pickled at byte `at`, and the position where the pickle ends."""
        end = min(len(data), at + MAX_PICKLE_BYTES)
        table = self._table()
        stack, memo = self._stack, self._memo
        begin, start, code = at, at, 0
        try:
            for _ in range(MAX_OPCODES):
                start, code = at, data[at]
                # Inlined: these opcodes are over two thirds of a file.
                if code == _BINGET:
                    stack.append(memo[data[at + 1]])
                    at += 2
                elif code == _LONG_BINPUT:
                    (index,) = _UINT32.unpack_from(data, at + 1)
                    if index > len(memo) + 1:
                        raise MalformedError(f"memo entry {index} out of sequence")
                    memo[index] = stack[-1]
                    at += 5
                elif code == _BININT1:
                    stack.append(data[at + 1])
                    at += 2
                elif code == _EMPTY_TUPLE:
                    stack.append(())
                    at += 1
                else:
                    decode, handle = table[code]
                    if decode is not None:
                        arg, at = decode(data, at + 1, end)
                        handle(arg)
                    elif handle is not None:
                        at += 1
                        handle()
                    else:
                        break
            else:
                raise MalformedError(f"the pickle has more than {MAX_OPCODES} opcodes")
            if code not in OPCODES:
                raise MalformedError("not an opcode that torch.save writes")
            if self._marks or len(stack) != 1:
                raise MalformedError("the pickle does not end with exactly one object")
            return stack[0], at + 1
        except MalformedError as error:
            if error.entry:
                raise
            reason = error.reason
        except ValueError as error:
            reason = shorten(str(error))
        except KeyError as error:
            reason = f"memo entry {error} does not exist"
        except (IndexError, struct.error):
            underflow = "an opcode takes more than the stack holds"
            reason = underflow if at < end else "the pickle ends early"
        name = OPCODES[code].name if code in OPCODES else f"0x{code:02x}"
        where = f"opcode {name} at byte {start - begin} of the pickle"
        raise MalformedError(f"{reason} ({where})")

    def _table(self) -> list[tuple[Decode | None, Any]]:
        """The decoder and handler of each opcode byte; STOP and unknown bytes have neither."""
        table: list[tuple[Decode | None, Any]] = [(None, None)] * 256
        for code, opcode in OPCODES.items():
            if opcode.name in _HANDLERS:
                table[code] = (opcode.decode, _HANDLERS[opcode.name].__get__(self))
            elif opcode.decode is not None:
                table[code] = (opcode.decode, self._stack.append)
        return table

    def charge(self, work: int) -> None:
        """Counts work against the opcode limit."""
        self._left -= work
        if self._left < 0:
            raise MalformedError(f"the pickle needs more than {MAX_OPCODES} steps")

    def key(self, key: object) -> Hashable:
        """Returns `key` if hashing it is cheap and cannot recurse."""
        if type(key) is str:
            return key
        self._keys_left -= 1
        if self._keys_left < 0:
            raise MalformedError(f"more than {MAX_NON_STRING_KEYS} keys that are not strings")
        parts = key if type(key) is tuple else (key,)
        if len(parts) > MAX_KEY_LENGTH:
            raise MalformedError(
                f"a key of {len(parts)} elements, at most {MAX_KEY_LENGTH} are read"
            )
        for part in parts:
            if part is not None and type(part) not in (str, bytes, int, float, bool, Global):
                raise MalformedError(f"a key holding a {type(part).__name__}")
        return key

    def as_set(self, elements: object) -> set[Hashable]:
        """Returns a set of `elements`."""
        if not isinstance(elements, (list, tuple)):
            raise MalformedError(f"a set of a {type(elements).__name__}")
        self.charge(len(elements))
        return {self.key(element) for element in elements}

    def call(self, function: object, args: object) -> Any:
        """Returns the stand-in for `function(*args)`."""
        if not isinstance(function, Global):
            raise MalformedError(f"a call of a {type(function).__name__}")
        if type(args) is not tuple:
            raise MalformedError(
                f"a call of {function.name} with a {type(args).__name__} of arguments"
            )
        rebuild = self._rebuild.get(function.name)
        return Object(function.name, args) if rebuild is None else rebuild(self, args)

    # Opcode handlers, in the order of the pickle protocol's own description.

    def _skip(self, _: int) -> None:
        pass

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _pop_mark(self) -> list[Any]:
        at = self._marks.pop()
        if at > len(self._stack):
            raise MalformedError("a mark above the top of the stack")
        above = self._stack[at:]
        del self._stack[at:]
        return above

    def _pop(self) -> None:
        # A pickler also pops a mark when a tuple contains itself.
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _discard(self) -> None:
        self._pop_mark()

    def _tuple1(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def _tuple2(self) -> None:
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second)

    def _tuple3(self) -> None:
        third = self._stack.pop()
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second, third)

    def _tuple(self) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _list(self) -> None:
        self._stack.append(self._pop_mark())

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, elements: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(elements)
        elif not isinstance(target, Object):
            raise MalformedError(f"elements appended to a {type(target).__name__}")

    def _additems(self) -> None:
        elements = self._pop_mark()
        target = self._stack[-1]
        if type(target) is not set:
            raise MalformedError(f"elements added to a {type(target).__name__}")
        target.update(self.as_set(elements))

    def _setitem(self) -> None:
        value = self._stack.pop()
        self._update([self._stack.pop(), value])

    def _setitems(self) -> None:
        self._update(self._pop_mark())

    def _update(self, flat: list[Any]) -> None:
        if len(flat) % 2:
            raise MalformedError("a dict key without a value")
        target = self._stack[-1]
        if isinstance(target, Object):
            target.items = target.items if target.items is not None else {}
            target = target.items
        if type(target) is not dict:
            raise MalformedError(f"items set in a {type(target).__name__}")
        key = self.key
        for index in range(0, len(flat), 2):
            target[key(flat[index])] = flat[index + 1]

    def _dict(self) -> None:
        flat = self._pop_mark()
        self._stack.append({})
        self._update(flat)

    def _frozenset(self) -> None:
        self._stack.append(frozenset(self.as_set(self._pop_mark())))

    def _memoize(self) -> None:
        self._put(len(self._memo))

    def _put(self, index: int) -> None:
        # Picklers count from 0 (Python 2's from 1), without gaps.
        if not 0 <= index <= len(self._memo) + 1:
            raise MalformedError(f"memo entry {index} out of sequence")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _global(self, names: tuple[str, str]) -> None:
        module, name = names
        # A memo entry can repeat a name, so a long name would cost more than its own bytes.
        if len(module) + len(name) > MAX_NAME_LENGTH:
            raise MalformedError(f"a global's name is longer than {MAX_NAME_LENGTH} characters")
        self._stack.append(Global(f"{_RENAMED.get(module, module)}.{name}"))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise MalformedError("a global whose name is not a string")
        self._global((module, name))

    def _reduce(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = self.call(self._stack[-1], args)

    def _newobj(self) -> None:
        args = self._stack.pop()
        cls = self._stack[-1]
        if not isinstance(cls, Global) or type(args) is not tuple:
            raise MalformedError(f"an object made of a {type(cls).__name__}")
        self._stack[-1] = Object(cls.name, args)

    def _newobj_ex(self) -> None:
        self._stack.pop()
        self._newobj()

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        # Attributes of a dict (`state_dict()._metadata`) or of a tensor need not be read.
        if isinstance(target, Object):
            if target.state is not None:
                raise MalformedError(f"the state of a {shorten(target.cls)} is set twice")
            target.state = state
        elif isinstance(target, Global) or target is None or isinstance(target, (int, str, tuple)):
            raise MalformedError(f"state set on a {type(target).__name__}")

    def _persistent(self) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or not pid or type(pid[0]) is not str:
            raise MalformedError("a persistent id that is not a tuple starting with its kind")
        self._stack.append(self._persistent_load(pid))


_HANDLERS: Mapping[str, Any] = {
    "PROTO": Machine._skip,
    "FRAME": Machine._skip,
    "TUPLE1": Machine._tuple1,
    "TUPLE2": Machine._tuple2,
    "TUPLE3": Machine._tuple3,
    "TUPLE": Machine._tuple,
    "LIST": Machine._list,
    "APPEND": Machine._append,
    "APPENDS": Machine._appends,
    "DICT": Machine._dict,
    "SETITEM": Machine._setitem,
    "SETITEMS": Machine._setitems,
    "ADDITEMS": Machine._additems,
    "FROZENSET": Machine._frozenset,
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": Machine._discard,
    "BINPUT": Machine._put,
    "MEMOIZE": Machine._memoize,
    "LONG_BINGET": Machine._get,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._newobj,
    "NEWOBJ_EX": Machine._newobj_ex,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}
