"""Arrays on disk by path: what every checkpoint is made of.

Orbax stores a tree as nested dicts of its paths, so that the file doesn't depend on the class of
the model, and anything that reads Orbax checkpoints reads it. A step of a run that one process
holds is a safetensors file: Orbax takes some 50 ms of processor for a save however small, which is
more than many a run has between two of them.

Orbax casts dtypes in silence and reports a wrong structure far from its cause, so paths, shapes and
dtypes are compared here. What neither can hold goes into a record beside the arrays: the kind of a
PRNG key, the shape of an array without elements.
"""

import json
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._devices.placement import ShardingOf, on_one_device
from jaxgrad._devices.processes import several
from jaxgrad._disk import safetensors as _safetensors
from jaxgrad._disk.atomic import sync_names, synced
from jaxgrad._disk.malformed import MalformedError
from jaxgrad._disk.mapped import mapped
from jaxgrad._text import listed, nearest, spec
from jaxgrad._tree.flat import PyTree, flatten, is_array, is_key


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read, or put into the tree; the message says why."""

    __module__ = "jaxgrad"


_FILE = "arrays.safetensors"


def encode(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that are stored for a tree, by path, and the record of what can't be."""
    flat = flatten(tree)
    named = [(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)]
    _refuse_names([path for path, _ in named])
    arrays, keys, empty = {}, {}, {}
    for path, leaf in named:
        if is_key(leaf):
            keys[path] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        elif not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf, jnp.result_type(leaf))
        elif isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and several():
            leaf = np.asarray(leaf)  # all have it, and the first writes it
        if leaf.size:
            arrays[path] = leaf
        else:
            empty[path] = [str(leaf.dtype), list(leaf.shape)]
    return arrays, {"keys": keys, "empty": empty}


def decode(arrays: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that `encode` was given, by path."""
    empty = {p: jnp.zeros(shape, dtype) for p, (dtype, shape) in record.get("empty", {}).items()}
    leaves = {**arrays, **empty}
    for path, impl in record.get("keys", {}).items():
        leaves[path] = jax.random.wrap_key_data(leaves[path], impl=impl)
    return leaves


def shapes(
    found: Mapping[str, jax.ShapeDtypeStruct], record: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `decode` returns, read off without the arrays."""
    with jax.enable_x64(True):  # a float64 in the file is one, whatever JAX is set up to hold
        return jax.eval_shape(lambda arrays: decode(arrays, record), dict(found))


def write(path: Path, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Writes a directory that is there when it is whole; all processes call it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if several() or not all(x.dtype.name in _safetensors.DTYPES for x in arrays.values()):
        from orbax.checkpoint import v1 as ocp

        ocp.save(str(path), nest(arrays), custom_metadata=dict(record))
        return
    text = json.dumps(record)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.mkdir()
    try:
        with synced(unfinished / _FILE) as file:
            metadata = {"record": text, "crc32": str(zlib.crc32(text.encode()))}
            _safetensors.write(file, arrays, metadata)
        sync_names(unfinished)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_names(path.parent)


def write_together(path: Path, arrays: Mapping[str, Any], record: Mapping[str, Any]) -> Any:
    """Starts to write what several processes hold; the `result()` of what it returns waits."""
    from orbax.checkpoint import v1 as ocp

    return ocp.save_async(str(path), nest(arrays), custom_metadata=dict(record))


def read(path: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """The arrays that are stored, and our record beside them."""
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': there is no such directory.")
    if (path / _FILE).is_file():
        tensors, record = _read_file(path / _FILE)
        return {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in tensors.items()}, record
    from orbax.checkpoint import v1 as ocp

    try:
        found = ocp.metadata(str(path))
    except (ValueError, OSError, KeyError) as e:  # what Orbax raises for what is none, or damaged
        raise CheckpointError(f"'{path}' is no Orbax checkpoint, or a damaged one.") from e
    flat = flatten(found.metadata)
    arrays = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for p, x in zip(flat.paths, flat.leaves, strict=True)
        if hasattr(x, "shape")
    }
    record: Any = found.custom_metadata or {}
    return arrays, record


def load_arrays(path: Path, sharding_of: ShardingOf = on_one_device) -> dict[str, jax.Array]:
    """The arrays that are stored, by path, each in its place."""
    found, _ = read(path)
    shardings = {p: sharding_of(p, x.shape) for p, x in found.items()}
    if (path / _FILE).is_file():
        tensors, _ = _read_file(path / _FILE)
        arrays = {p: _placed(x, shardings[p]) for p, x in tensors.items()}
    else:
        arrays = _load_orbax(path, found, shardings)
    for p, x in arrays.items():  # Orbax reads in threads, where `with jax.enable_x64` is not seen
        if x.dtype != found[p].dtype:
            raise CheckpointError(
                f"'{p}' is {spec(found[p])} in '{path}', and JAX reads {x.dtype}. Load it after "
                "jax.config.update('jax_enable_x64', True)."
            )
    return arrays


def _load_orbax(
    path: Path,
    found: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
    from orbax.checkpoint import v1 as ocp

    abstract = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[p]) for p, x in found.items()
    }
    loaded = flatten(ocp.load(str(path), nest(abstract)))
    return dict(zip(loaded.paths, loaded.leaves, strict=True))


def _read_file(file: Path) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    try:
        data = mapped(file)
        entries, metadata = _safetensors.read_header(data)
    except MalformedError as e:
        what = ": ".join(part for part in (str(file), e.entry, e.reason) if part)
        raise CheckpointError(f"the checkpoint is damaged: {what}") from e
    text = metadata.get("record", "")
    if metadata.get("crc32") != str(zlib.crc32(text.encode())):
        raise CheckpointError(f"the checkpoint is damaged: {file}: its record is not whole")
    return {name: entry.array(data) for name, entry in entries.items()}, json.loads(text)


def _placed(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of a file in its place; each process reads its part, and none keeps the file."""
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.array(x[part]))


def check_fit(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    problems = []
    for p in wanted.keys() - held.keys():
        close = nearest(p, held)
        problems.append(f"it has no '{p}'" + (f" (nearest: '{close[0]}')" if close else ""))
    problems += [f"it has '{p}', which the tree has not" for p in held.keys() - wanted.keys()]
    for p in held.keys() & wanted.keys():
        if spec(held[p]) != spec(wanted[p]):
            problems.append(f"'{p}' is {spec(held[p])}, in the tree {spec(wanted[p])}")
    if problems:
        raise CheckpointError(
            f"the checkpoint '{path}' does not fit the tree: {listed(sorted(problems))}. Load it "
            "into the model that it was saved from (jaxgrad.inspect(path) lists what it holds)."
        )


def _refuse_names(paths: Sequence[str]) -> None:
    above = {"/".join(p.split("/")[:depth]) for p in paths for depth in range(1, p.count("/") + 1)}
    twice = [path for path, n in Counter(paths).items() if n > 1]
    why = None
    if "" in paths:
        why = "one without a name"
    elif twice:
        why = f"two at '{twice[0]}'"
    elif both := sorted(above.intersection(paths)):
        why = f"one at '{both[0]}' and others below it"
    if why:
        raise CheckpointError(
            f"a checkpoint holds arrays by path, and this tree has {why}. "
            'Save a tree like {"kernel": array}.'
        )


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts of leaves by path, as they are stored."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
