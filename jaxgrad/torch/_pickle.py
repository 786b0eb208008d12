"""A pickle machine that builds data and runs nothing.

`pickle.Unpickler` with an allow-list can not be made safe: a deep tuple as a dict key overflows
the C stack, and BUILD writes attributes of whatever an allowed global names. So the opcodes are
decoded by `pickletools.genops`, which executes nothing, and interpreted here: a global is an inert
name, a call of a global that is not in the table of `_rebuild` is an inert `Object`, and only
scalars and short flat tuples can be keys. Only the opcodes that picklers write are known.

Every opcode costs bounded time and memory (none copies what a memo entry can repeat), so the cost
of a pickle is bounded by its opcode count, which has a limit.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxgrad.torch._errors import MalformedError, shorten

MAX_OPCODES = 8_000_000  # ~32 opcodes per tensor
MAX_INT_BITS = 1024
MAX_NAME_LENGTH = 1024
MAX_KEY_LENGTH = 16
# Integer hashes are not salted, so crafted keys make a dict quadratic; strings are safe.
MAX_NON_STRING_KEYS = 1 << 17
_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class Stream(Protocol):
    """What `pickletools.genops` reads from."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function; never imported."""

    name: str


@dataclasses.dataclass(slots=True, eq=False)
class Object:
    """What a call of a global would have made: its class, arguments and contents, inert."""

    cls: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | None = None


Rebuild = Callable[["Machine", tuple[Any, ...]], Any]


class Machine:
    """Interprets one pickle.

    Args:
        rebuild: by global name, what its call makes.
        persistent_load: what a persistent id, a tuple, stands for.
    """

    def __init__(
        self, rebuild: Mapping[str, Rebuild], persistent_load: Callable[[tuple[Any, ...]], Any]
    ):
        self._rebuild = rebuild
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._left = MAX_OPCODES
        self._keys_left = MAX_NON_STRING_KEYS

    def load(self, stream: Stream) -> Any:
        """The object that the pickle at the stream's position describes."""
        ops = pickletools.genops(stream)  # pyright: ignore[reportArgumentType]
        code, position = "", 0
        handlers = {name: handler.__get__(self) for name, handler in _HANDLERS.items()}
        try:
            for opcode, arg, at in ops:
                code, position = opcode.name, at
                self.charge(1)
                if code == "STOP":
                    break
                if code not in handlers:
                    raise MalformedError(f"opcode {code} is not one that torch.save writes")
                handlers[code](arg)
            if self._marked or len(self._stack) != 1:
                raise MalformedError("the pickle does not end with exactly one object")
            return self._stack[0]
        except MalformedError as error:
            reason = f"{error.reason} (pickle opcode {code} at byte {position})"
            raise MalformedError(reason, error.entry) from None
        except IndexError:
            reason = f"pickle opcode {code} at byte {position} takes more than the stack holds"
            raise MalformedError(reason) from None
        # genops raises ValueError; a bad escape in a protocol-0 string warns.
        except (ValueError, DeprecationWarning) as error:
            reason = f"not a pickle after byte {position}: {shorten(str(error))}"
            raise MalformedError(reason) from None

    def charge(self, work: int) -> None:
        """Counts work against the limit of opcodes."""
        self._left -= work
        if self._left < 0:
            raise MalformedError(f"the pickle needs more than {MAX_OPCODES} steps")

    def key(self, key: Any) -> Any:
        """`key`, when hashing it is cheap and can not recurse."""
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

    def as_set(self, elements: Any) -> set[Any]:
        """A set of `elements`."""
        if not isinstance(elements, (list, tuple)):
            raise MalformedError(f"a set of a {type(elements).__name__}")
        self.charge(len(elements))
        return {self.key(element) for element in elements}

    def call(self, function: Any, args: Any) -> Any:
        """The stand-in for `function(*args)`."""
        if not isinstance(function, Global):
            raise MalformedError(f"a call of a {type(function).__name__}")
        if type(args) is not tuple:
            raise MalformedError(
                f"a call of {function.name} with a {type(args).__name__} of arguments"
            )
        rebuild = self._rebuild.get(function.name)
        return Object(function.name, args) if rebuild is None else rebuild(self, args)

    # Opcode handlers, in the order of the pickle protocol's own description.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        above = self._stack
        self._stack = self._marked.pop()
        return above

    def _long(self, value: int) -> None:
        if value.bit_length() > MAX_INT_BITS:
            raise MalformedError(f"an integer of {value.bit_length()} bits, at most {MAX_INT_BITS}")
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _pop(self, _: Any) -> None:
        # A pickler pops a mark, too, when it finds a tuple inside itself.
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _discard(self, _: Any) -> None:
        self._pop_mark()

    def _tuple(self, size: int | None) -> None:
        if size is None:
            elements = tuple(self._pop_mark())
        else:
            if len(self._stack) < size:
                raise IndexError
            elements = tuple(self._stack[-size:])
            del self._stack[-size:]
        self._stack.append(elements)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _extend(self, elements: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is list:
            target.extend(elements)
        elif not isinstance(target, Object):
            raise MalformedError(f"elements appended to a {type(target).__name__}")

    def _additems(self, _: Any) -> None:
        elements = self._pop_mark()
        target = self._stack[-1]
        if type(target) is not set:
            raise MalformedError(f"elements added to a {type(target).__name__}")
        target.update(self.as_set(elements))

    def _setitem(self, _: Any) -> None:
        value = self._stack.pop()
        self._update([self._stack.pop(), value])

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

    def _dict(self, _: Any) -> None:
        flat = self._pop_mark()
        self._stack.append({})
        self._update(flat)

    def _put(self, index: int) -> None:
        # Picklers count from 0 (Python 2's from 1), without gaps.
        if not 0 <= index <= len(self._memo) + 1:
            raise MalformedError(f"memo entry {index} out of sequence")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise MalformedError(f"memo entry {index} does not exist")
        self._stack.append(self._memo[index])

    def _global(self, dotted: str) -> None:
        module, _, name = dotted.partition(" ")
        self._push_global(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise MalformedError("a global whose name is not a string")
        self._push_global(module, name)

    def _push_global(self, module: str, name: str) -> None:
        # A memo entry can repeat a name, so a long one would cost more than its bytes.
        if len(module) + len(name) > MAX_NAME_LENGTH:
            raise MalformedError(f"a global's name is longer than {MAX_NAME_LENGTH} characters")
        self._stack.append(Global(f"{_RENAMED.get(module, module)}.{name}"))

    def _reduce(self, _: Any) -> None:
        args = self._stack.pop()
        self._stack[-1] = self.call(self._stack[-1], args)

    def _newobj(self, _: Any) -> None:
        args = self._stack.pop()
        cls = self._stack[-1]
        if not isinstance(cls, Global) or type(args) is not tuple:
            raise MalformedError(f"an object made of a {type(cls).__name__}")
        self._stack[-1] = Object(cls.name, args)

    def _newobj_ex(self, _: Any) -> None:
        self._stack.pop()
        self._newobj(None)

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        # The attributes of a dict (`state_dict()._metadata`) or a tensor hold nothing to read.
        if isinstance(target, Object):
            if target.state is not None:
                raise MalformedError(f"the state of a {shorten(target.cls)} is set twice")
            target.state = state
        elif isinstance(target, Global) or target is None or isinstance(target, (int, str, tuple)):
            raise MalformedError(f"state set on a {type(target).__name__}")

    def _persistent(self, _: Any) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or not pid or type(pid[0]) is not str:
            raise MalformedError("a persistent id that is not a tuple starting with its kind")
        self._stack.append(self._persistent_load(pid))


_HANDLERS: Mapping[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), Machine._push),
    **dict.fromkeys(("LONG1", "LONG4"), Machine._long),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), Machine._push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), Machine._push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), Machine._push),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "TUPLE": Machine._tuple,
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "LIST": lambda machine, _: machine._push(machine._pop_mark()),
    "APPEND": Machine._append,
    "APPENDS": lambda machine, _: machine._extend(machine._pop_mark()),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "DICT": Machine._dict,
    "SETITEM": Machine._setitem,
    "SETITEMS": lambda machine, _: machine._update(machine._pop_mark()),
    "EMPTY_SET": lambda machine, _: machine._push(set()),
    "ADDITEMS": Machine._additems,
    "FROZENSET": lambda machine, _: machine._push(frozenset(machine.as_set(machine._pop_mark()))),
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": Machine._discard,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine._put),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._get),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._newobj,
    "NEWOBJ_EX": Machine._newobj_ex,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}
