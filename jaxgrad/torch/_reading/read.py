"""`read`: any PyTorch checkpoint file as named, read-only, memory-mapped NumPy arrays.

The content determines the format, not the file name: people call everything `.pt`. Reading builds
views and loads no tensor, so a file larger than memory opens in milliseconds; the operating system
loads pages as they are used.
"""

import dataclasses
import difflib
import mmap
import os
import pathlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from jaxgrad._disk.malformed import MalformedError, shorten
from jaxgrad._disk.mapped import mapped
from jaxgrad._disk.safetensors import parse_json
from jaxgrad._text import table
from jaxgrad.torch._reading.errors import TorchFileError, naming
from jaxgrad.torch._reading.legacy_file import MAGIC, load_legacy
from jaxgrad.torch._reading.module import Contents, Module, contents
from jaxgrad.torch._reading.safetensors_file import load_safetensors, read_index
from jaxgrad.torch._reading.tensors import Arrays
from jaxgrad.torch._reading.zip_file import load_zip

T = TypeVar("T")

MAX_INDEX_BYTES = 1 << 27
_SHOWN_ROWS = 40


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """What `read` finds in a file: tensors, scalars and structure, by dotted name.

    Attributes:
        path: the file.
        format: "zip", "legacy", "safetensors" or "sharded".
        tensors: read-only, memory-mapped arrays in file order. A whole module has the names of its
            `state_dict()`, a nested training checkpoint has prefixed names
            ("model.0.weight", "optimizer.state.0.momentum_buffer"), a bare tensor has the name "".
        tied: groups of names that share memory, shape and strides.
        module: the structure of a whole-module file, else None.
        values: numbers, strings and None ("epoch", "optimizer.param_groups.0.lr"); a sequence of
            more than 1024 of them is one tuple.
        opaque: the classes of all other objects, by name. Nothing of them is run or read.
        modules: the whole modules inside a nested checkpoint, by prefix.

    Example:
        >>> import numpy as np
        >>> Checkpoint(pathlib.Path("net.pt"), "zip", {"bias": np.zeros(3)}, values={"epoch": 2})
        net.pt (zip): 1 tensors, 24 bytes
          bias  (3,)  float64  24
          and 1 values
    """

    path: pathlib.Path
    format: str
    tensors: Mapping[str, np.ndarray]
    tied: tuple[tuple[str, ...], ...] = ()
    module: Module | None = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    opaque: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)

    def sub(self, prefix: str) -> "Checkpoint":
        """Returns one part of a nested training checkpoint, without the prefix in its names.

        Args:
            prefix: leading components of the names: "model", "state_dict.encoder".

        Returns:
            The part as a checkpoint; its arrays are the same views of the file.

        Raises:
            KeyError: no name has this prefix; the message lists the nearest.

        Example:
            >>> import numpy as np
            >>> tensors = {"model.bias": np.zeros(3), "ema.bias": np.ones(3)}
            >>> list(Checkpoint(pathlib.Path("run.pt"), "zip", tensors).sub("model").tensors)
            ['bias']
        """

        def strip(named: Mapping[str, T]) -> Mapping[str, T]:
            dot = f"{prefix}."
            kept = {name: part for name, part in named.items() if f"{name}.".startswith(dot)}
            return MappingProxyType({name[len(dot) :]: part for name, part in kept.items()})

        part = dataclasses.replace(
            self,
            tensors=strip(self.tensors),
            tied=_tied_groups([strip(dict.fromkeys(names)) for names in self.tied]),
            values=strip(self.values),
            opaque=strip(self.opaque),
            modules=strip(self.modules),
        )
        if not (part.tensors or part.values or part.opaque or part.modules):
            known = {
                name[:at]
                for name in (*self.tensors, *self.values)
                for at in (index for index, char in enumerate(name) if char == ".")
            }
            near = difflib.get_close_matches(prefix, known, n=3) or sorted(known)[:8]
            raise KeyError(f"no name in {self.path} is under {prefix!r}; prefixes: {near}")
        return dataclasses.replace(part, module=part.modules.get(""))

    def __repr__(self) -> str:
        nbytes = sum(array.nbytes for array in self.tensors.values())
        lines = [f"{self.path} ({self.format}): {len(self.tensors)} tensors, {nbytes:,} bytes"]
        shown = list(self.tensors.items())[:_SHOWN_ROWS]
        rows = [
            (shorten(name) or "(the file)", str(array.shape), str(array.dtype), f"{array.nbytes:,}")
            for name, array in shown
        ]
        lines += table(rows, "  ")
        if len(self.tensors) > len(shown):
            lines.append(f"  ... and {len(self.tensors) - len(shown)} more")
        lines += [f"  tied: {' = '.join(map(shorten, names))}" for names in self.tied[:_SHOWN_ROWS]]
        if self.values:
            lines.append(f"  and {len(self.values)} values")
        lines += [
            f"  not read: {shorten(name)} ({shorten(cls)})"
            for name, cls in list(self.opaque.items())[:_SHOWN_ROWS]
        ]
        return "\n".join(lines)


def read(path: str | os.PathLike[str], *, checksums: bool = False) -> Checkpoint:
    """Opens a PyTorch checkpoint without PyTorch and without running its pickled code.

    Stands in for `torch.load(path, mmap=True)`, and reads whole pickled modules too, which
    `weights_only=True` refuses. Pickled classes and functions are never imported.

    If a file shrinks while its arrays are in use, the process dies, as with any memory map.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.ckpt` file of `torch.save` (zip, or the legacy format
            before PyTorch 1.6), a `.safetensors` file, or a Hugging Face `*.index.json` next to
            its shards. The content decides, not the suffix.
        checksums: whether to verify the CRC-32 of every storage in a zip file, which reads the
            whole file. By default only the pickle and small storages are verified. Other formats
            have no checksums and are then refused.

    Returns:
        The `Checkpoint`: read-only NumPy arrays over the file, by dotted name. 16- and 8-bit
        floats have `ml_dtypes` dtypes.

    Raises:
        TorchFileError: the file is damaged, hostile or of another format, or holds something other
            than dense arrays: a TorchScript program, a sparse or a quantised tensor.
        FileNotFoundError, IsADirectoryError, PermissionError: as `open` raises them.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> from safetensors.numpy import save_file
        >>> path = pathlib.Path(tempfile.mkdtemp(), "net.safetensors")
        >>> save_file({"bias": np.arange(3.0)}, path)
        >>> read(path).tensors["bias"]
        array([0., 1., 2.])
    """
    path = pathlib.Path(path)
    with naming(path):
        data = mapped(path)
        if data[:4] == b"PK\3\4":
            found = contents(load_zip(data, checksums))
            return _checkpoint(path, "zip", found, data)
        if path.name.endswith(".index.json"):
            return _read_shards(path, data, checksums)
        if checksums:
            raise MalformedError("only zip files carry checksums")
        if data[: len(MAGIC)] == MAGIC:
            return _checkpoint(path, "legacy", contents(load_legacy(data)), data)
        if data[8:9] == b"{":
            return _checkpoint(path, "safetensors", load_safetensors(data), data)
        raise MalformedError(_unknown(data))


def _unknown(data: mmap.mmap) -> str:
    start = data[:512]
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if start[257:262] == b"ustar":
        return "a tar file of PyTorch 0.1.9 or older; save it again with a newer PyTorch"
    if start.startswith(b"\x80"):
        return "a pickle, but not one of torch.save"
    return f"neither a torch.save file nor safetensors: it starts with {start[:8]!r}"


def _checkpoint(path: pathlib.Path, kind: str, found: Contents, data: mmap.mmap) -> Checkpoint:
    arrays = Arrays(data)
    same: dict[tuple[Hashable, ...], dict[str, None]] = {}
    for name, tensor in found.tensors.items():
        if 0 not in tensor.shape:
            same.setdefault(tensor.memory(), {})[name] = None
    made: dict[int, np.ndarray] = {}
    for tensor in found.tensors.values():
        if id(tensor) not in made:
            made[id(tensor)] = arrays.array(tensor)
    return Checkpoint(
        path=path,
        format=kind,
        tensors=MappingProxyType({n: made[id(tensor)] for n, tensor in found.tensors.items()}),
        tied=_tied_groups(list(same.values())),
        module=found.modules.get(""),
        values=MappingProxyType(found.values),
        opaque=MappingProxyType(found.opaque),
        modules=MappingProxyType(found.modules),
    )


def _tied_groups(
    groups: Iterable[Sequence[str] | Mapping[str, None]],
) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names) for names in groups if len(names) > 1)


def _read_shards(path: pathlib.Path, data: mmap.mmap, checksums: bool) -> Checkpoint:
    if len(data) > MAX_INDEX_BYTES:
        raise MalformedError(f"an index of {len(data)} bytes, at most {MAX_INDEX_BYTES} are read")
    index = parse_json(data[:])
    tensors: dict[str, np.ndarray] = {}
    tied: list[tuple[str, ...]] = []
    for file, names in read_index(index, path.parent).items():
        shard = read(path.parent / file, checksums=checksums)
        for name in names:
            if name not in shard.tensors:
                raise TorchFileError(
                    shard.path, shorten(name), f"is missing, but {path.name} lists it here"
                )
            tensors[name] = shard.tensors[name]
        tied += [tuple(name for name in group if name in set(names)) for group in shard.tied]
    metadata = index.get("metadata")
    found = contents({"metadata": metadata} if isinstance(metadata, dict) else {})
    order = {name: tensors[name] for name in index["weight_map"]}
    return Checkpoint(
        path=path,
        format="sharded",
        tensors=MappingProxyType(order),
        tied=_tied_groups(tied),
        values=MappingProxyType(found.values),
    )
