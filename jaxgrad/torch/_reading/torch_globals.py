"""The meaning of the globals in PyTorch's own pickles.

This table is complete: any other call stays an inert `Object`. Sparse, quantised and meta tensors
become `Unreadable`; the error is raised later, once the tensor's name is known.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxgrad._disk.malformed import MalformedError, checked_int, shorten
from jaxgrad.torch._reading.tensors import DTYPES, STORAGE_DTYPES, Storage, make_tensor
from jaxgrad.torch._reading.unpickler import Global, Machine, Object, Rebuild


@dataclasses.dataclass(frozen=True, slots=True)
class Unreadable:
    """A tensor that is not a dense array: why, and what to do about it."""

    reason: str


def _arity(name: str, args: tuple[Any, ...], least: int, most: int) -> None:
    if not least <= len(args) <= most:
        raise MalformedError(f"{name} takes {least} to {most} arguments, got {len(args)}")


def _tensor_v2(_: Machine, args: tuple[Any, ...]) -> Any:
    # storage, offset, size, stride, requires_grad, backward_hooks, metadata; the last three were
    # added one by one in later versions.
    _arity("_rebuild_tensor", args, 4, 7)
    storage, offset, shape, strides = args[:4]
    if isinstance(storage, Unreadable):
        return storage
    if not isinstance(storage, Storage):
        raise MalformedError(f"a tensor's storage is a {type(storage).__name__}")
    metadata = args[6] if len(args) == 7 else None
    return make_tensor(storage, storage.dtype, offset, shape, strides, metadata)


def _tensor_v3(_: Machine, args: tuple[Any, ...]) -> Any:
    # As v2, plus a dtype: these dtypes have no storage class.
    _arity("_rebuild_tensor_v3", args, 7, 8)
    storage, offset, shape, strides, _grad, _hooks, dtype = args[:7]
    if not isinstance(storage, Storage):
        raise MalformedError(f"a tensor's storage is a {type(storage).__name__}")
    if not isinstance(dtype, Global) or not dtype.name.startswith("torch."):
        raise MalformedError(f"a tensor's dtype is a {type(dtype).__name__}")
    metadata = args[7] if len(args) == 8 else None
    name = dtype.name.removeprefix("torch.")
    if name not in DTYPES:
        readable = ", ".join(DTYPES)
        return Unreadable(f"has the dtype torch.{shorten(name)}; readable are {readable}")
    return make_tensor(storage, DTYPES[name], offset, shape, strides, metadata)


def _parameter(_: Machine, args: tuple[Any, ...]) -> Any:
    _arity("_rebuild_parameter", args, 2, 4)
    return args[0]


def _from_type(machine: Machine, args: tuple[Any, ...]) -> Any:
    # A tensor subclass, or a tensor with attributes: its function and arguments make the tensor.
    _arity("_rebuild_from_type_v2", args, 4, 4)
    return machine.call(args[0], args[2])


def _dict(machine: Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    # `OrderedDict()`, Python 2's `OrderedDict([[key, value], ...])`, `defaultdict(factory)`.
    made: dict[Any, Any] = {}
    for pairs in args:
        if isinstance(pairs, dict):
            pairs = pairs.items()
        elif not isinstance(pairs, (list, tuple)):
            continue
        machine.charge(len(pairs))
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise MalformedError("a dict made of something other than pairs")
            made[machine.key(pair[0])] = pair[1]
    return made


def _size(_: Machine, args: tuple[Any, ...]) -> Any:
    _arity("torch.Size", args, 1, 1)
    return args[0] if isinstance(args[0], tuple) else Object("torch.Size", args)


def _set(machine: Machine, args: tuple[Any, ...]) -> set[Any]:
    _arity("set", args, 0, 1)
    return machine.as_set(args[0] if args else ())


def _unreadable(reason: str) -> Rebuild:
    return lambda machine, args: Unreadable(reason)


_SPARSE = "is a sparse tensor; save it dense (`.to_dense()`)"
_QUANTISED = "is a quantised tensor; save it dequantised (`.dequantize()`)"

REBUILD: Mapping[str, Rebuild] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_sparse_tensor": _unreadable(_SPARSE),
    "torch._utils._rebuild_sparse_csr_tensor": _unreadable(_SPARSE),
    "torch._utils._rebuild_qtensor": _unreadable(_QUANTISED),
    "torch._utils._rebuild_nested_tensor": _unreadable(
        "is a nested tensor; save its parts (`.unbind()`)"
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable(
        "is a meta tensor, which has no values; save the materialised one"
    ),
    "torch._utils._rebuild_wrapper_subclass": _unreadable(
        "is a tensor subclass without memory of its own; save a plain tensor"
    ),
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "collections.Counter": _dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "torch.Size": _size,
}


def load_storage(fields: tuple[Any, ...], place: Callable[[str, int], int]) -> Storage | Unreadable:
    """The storage of a persistent id's `(type, key, location, numel)`.

    `place` maps a storage's key and length to the start of its bytes.
    """
    if len(fields) != 4:
        raise MalformedError(f"a storage's persistent id has {len(fields) + 1} fields, expected 5")
    kind, key, _location, numel = fields
    if not isinstance(kind, Global) or type(key) is not str:
        raise MalformedError("a storage's persistent id without a type or key")
    if kind.name.startswith("torch.Q"):
        return Unreadable(_QUANTISED)
    if kind.name not in STORAGE_DTYPES:
        raise MalformedError(f"unknown storage type {shorten(kind.name)}")
    dtype = DTYPES[STORAGE_DTYPES[kind.name]]
    nbytes = checked_int(checked_int(numel, "storage size") * dtype.itemsize, "storage bytes")
    return Storage(key, dtype, nbytes, place(key, nbytes))
