"""Arrays on disk by path: what every checkpoint is made of.

Orbax stores a tree as nested dicts of its paths, so that the file doesn't depend on the class of
the model, and anything that reads Orbax checkpoints reads it. A step of a run that one process
holds is a safetensors file: Orbax takes some 50 ms of processor time for a save however small,
more than many a run has between two of them. Both carry the same record, and one reader reads both.

Orbax casts dtypes in silence and reports a wrong structure far from its cause, so paths, shapes and
dtypes are compared here. What neither format can hold goes into the record: the kind of a PRNG key,
the shape of an array without elements.
"""

import dataclasses
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._checkpoint.record import CheckpointError, Empty, Record, UnreadableError
from jaxgrad._devices.placement import ShardingOf, on_one_device
from jaxgrad._devices.processes import barrier, from_first, is_first, several, whole
from jaxgrad._disk import safetensors as _safetensors
from jaxgrad._disk.atomic import replacing_directory, synced, unfinished
from jaxgrad._disk.digest import Array, checksum
from jaxgrad._disk.malformed import MalformedError
from jaxgrad._disk.mapped import mapped
from jaxgrad._text import Leaf, listed, nearest, spec
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_key, is_value

_FILE = "arrays.safetensors"


class Response(Protocol):
    """A save that is under way."""

    def result(self) -> object:
        """Waits for its end."""
        ...


class Stored(NamedTuple):
    """A checkpoint that is open for reading.

    Attributes:
        path: its directory.
        shapes: shape and dtype of each array as it is stored.
        record: what it knows beside them.
        tensors: the arrays of a safetensors file; None for Orbax's.
        tree: Orbax's own tree of its arrays, None for a safetensors file.
    """

    path: Path
    shapes: dict[str, jax.ShapeDtypeStruct]
    record: Record
    tensors: Mapping[str, np.ndarray] | None
    tree: Flat | None


# Between the leaves of a tree and the arrays that are stored.


class Encoded(NamedTuple):
    """A tree as it is stored.

    Attributes:
        arrays: what is stored, by path.
        keys: the implementation of each PRNG key, by path; its words are among the arrays.
        empty: the arrays without elements, by path.
    """

    arrays: dict[str, Array]
    keys: dict[str, str]
    empty: dict[str, Empty]


def encode(tree: PyTree) -> Encoded:
    """The arrays that are stored for a tree, and what goes into the record instead."""
    encoded = Encoded({}, {}, {})
    for path, leaf in _named(tree):
        if is_key(leaf):
            encoded.keys[path] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        elif not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf, jnp.result_type(leaf))
        elif isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and several():
            leaf = np.asarray(leaf)  # all have it, and the first writes it
        if leaf.size:
            encoded.arrays[path] = leaf
        else:
            encoded.empty[path] = Empty(str(leaf.dtype), leaf.shape)
    return encoded


def decode(
    arrays: Mapping[str, jax.Array], record: Record, paths: Collection[str] | None = None
) -> dict[str, jax.Array]:
    """The leaves that `encode` was given, by path: all of them, or those at `paths`."""
    empty = {p: jnp.zeros(x.shape, x.dtype) for p, x in record.empty.items()}
    leaves = {**arrays, **empty}
    if paths is not None:
        leaves = {path: leaf for path, leaf in leaves.items() if path in paths}
    for path in record.keys.keys() & leaves.keys():
        leaves[path] = jax.random.wrap_key_data(leaves[path], impl=record.keys[path])
    return leaves


def shapes(stored: Stored) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the leaves, found without reading the arrays."""
    with jax.enable_x64(True):  # a float64 in the file is one, whatever JAX is set up to hold
        return jax.eval_shape(lambda arrays: decode(arrays, stored.record), stored.shapes)


# Writing.


def write(path: Path, tree: Encoded, record: Record, *, orbax: bool = False) -> None:
    """Writes a tree to a directory that appears complete or not at all, in place of any before it.

    Args:
        path: the directory.
        tree: what to write; all of several processes call this.
        record: what to write beside it.
        orbax: write Orbax's format even if a safetensors file could hold the arrays.
    """
    new = unfinished(path, from_first(secrets.token_hex(4)))
    fits = all(x.dtype.name in _safetensors.DTYPES for x in tree.arrays.values())
    metadata = _sealed(tree, record).to_metadata()
    with replacing_directory(path, new) if is_first() else nullcontext():
        if orbax or several() or not fits:
            from orbax.checkpoint import v1 as ocp

            ocp.save(str(new), nest(tree.arrays), custom_metadata={**metadata})
        else:
            new.mkdir()
            with synced(new / _FILE) as file:
                _safetensors.write(file, tree.arrays, metadata)
    barrier("written")


def write_together(path: Path, tree: Encoded, record: Record) -> Response:
    """Starts to write what several processes hold.

    Orbax itself writes under another name, and renames once all processes have written.
    """
    from orbax.checkpoint import v1 as ocp

    metadata = _sealed(tree, record).to_metadata()
    return ocp.save_async(str(path), nest(tree.arrays), custom_metadata={**metadata})


def _sealed(tree: Encoded, record: Record) -> Record:
    """The record of a tree; processes gather for it what none of them holds alone."""
    sums = {path: checksum(path, whole(x)) for path, x in tree.arrays.items()}
    return dataclasses.replace(record, keys=tree.keys, empty=tree.empty, checksums=sums)


# Reading.


def read(path: Path) -> Stored:
    """Opens a checkpoint: of jaxgrad, or any tree that Orbax saved.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is not a checkpoint, it is damaged, or of another format version.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': there is no such directory.")
    if (path / _FILE).is_file():
        return _read_file(path)
    from orbax.checkpoint import v1 as ocp

    try:
        found = ocp.metadata(str(path))
        if found.metadata is None:  # Orbax only logs why
            raise ValueError("Orbax can't read the metadata of its arrays.")
    except (ValueError, OSError, KeyError) as e:  # what Orbax raises for any other directory
        raise CheckpointError(f"'{path}' is not an Orbax checkpoint, or a damaged one.") from e
    flat = flatten(found.metadata)
    specs = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for p, x in zip(flat.paths, flat.leaves, strict=True)
        if hasattr(x, "shape")
    }
    return Stored(path, specs, Record.from_metadata(found.custom_metadata, path), None, flat)


def _read_file(path: Path) -> Stored:
    try:
        data = mapped(path / _FILE)
        entries, metadata = _safetensors.read_header(data)
    except MalformedError as e:
        what = ": ".join(part for part in (str(path / _FILE), e.entry, e.reason) if part)
        raise CheckpointError(f"the checkpoint is damaged: {what}") from e
    tensors = {name: entry.array(data) for name, entry in entries.items()}
    specs = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in tensors.items()}
    return Stored(path, specs, Record.from_metadata(metadata, path), tensors, None)


def load_leaves(
    stored: Stored,
    paths: Collection[str] | None = None,
    sharding_of: ShardingOf = on_one_device,
) -> dict[str, jax.Array]:
    """The leaves of a checkpoint by path, each in its place: all of them, or those at `paths`.

    Raises:
        CheckpointError: a checksum is wrong.
        UnreadableError: JAX is not set up to hold a dtype.
    """
    wanted = {p: x for p, x in stored.shapes.items() if paths is None or p in paths}
    shardings = {p: sharding_of(p, x.shape) for p, x in wanted.items()}
    if stored.tensors is not None:
        arrays = {p: _placed(stored.tensors[p], sharding) for p, sharding in shardings.items()}
    else:
        arrays = _load_orbax(stored, shardings)
    for p, x in arrays.items():  # Orbax reads in threads, which don't see `with jax.enable_x64`
        if x.dtype != wanted[p].dtype:
            raise UnreadableError(
                f"'{p}' is {spec(wanted[p])} in '{stored.path}', and JAX reads {x.dtype}. Load it "
                "after jax.config.update('jax_enable_x64', True)."
            )
    _check_sums(stored, arrays, paths)
    return decode(arrays, stored.record, paths)


def _check_sums(
    stored: Stored, arrays: Mapping[str, jax.Array], paths: Collection[str] | None
) -> None:
    sums = stored.record.checksums
    if sums is None:
        return
    found = {p: checksum(p, whole(x)) for p, x in arrays.items()}
    expected = {p: crc for p, crc in sums.items() if paths is None or p in paths}
    wrong = [p for p in sorted(found | expected) if found.get(p) != expected.get(p)]
    if wrong:
        raise CheckpointError(
            f"'{stored.path}' is damaged: the checksum of {listed(map(repr, wrong))} is wrong. "
            "Load an earlier step, or a copy."
        )


def _load_orbax(
    stored: Stored, shardings: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    from orbax.checkpoint import v1 as ocp

    assert stored.tree is not None
    # In Orbax's own tree: nested dicts of its paths are refused where it has a list.
    abstract = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[p])
        if p in shardings
        else x
        if x is None
        else ocp.PLACEHOLDER
        for p, x in zip(stored.tree.paths, stored.tree.leaves, strict=True)
    ]
    loaded = flatten(ocp.load(str(stored.path), stored.tree.treedef.unflatten(abstract)))
    leaves = dict(zip(loaded.paths, loaded.leaves, strict=True))
    return {path: leaves[path] for path in shardings}


def _placed(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of a file in its place; each process reads its part, and none keeps the file."""
    return jax.make_array_from_callback(x.shape, sharding, lambda part: np.array(x[part]))


# What fits, and what has a name.


def check_fit(path: Path, held: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> None:
    """Raises, naming the paths, if arrays of a checkpoint are not those of a tree."""
    problems = []
    for p in wanted.keys() - held.keys():
        close = nearest(p, held)
        problems.append(f"it has no '{p}'" + (f" (nearest: '{close[0]}')" if close else ""))
    problems += [f"it has '{p}', which the tree does not" for p in held.keys() - wanted.keys()]
    for p in held.keys() & wanted.keys():
        if spec(held[p]) != spec(wanted[p]):
            problems.append(f"'{p}' is {spec(held[p])}, in the tree {spec(wanted[p])}")
    if problems:
        raise CheckpointError(
            f"the checkpoint '{path}' does not fit the tree: {listed(sorted(problems))}. Load it "
            "into the model that it was saved from (jaxgrad.inspect(path) lists what it holds)."
        )


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    """The arrays and numbers of a tree with their paths, which must be names in a directory."""
    flat = flatten(tree)
    named = [(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True) if is_value(x)]
    _refuse_names([path for path, _ in named])
    return named


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


def nest(leaves: Mapping[str, object]) -> dict[str, Any]:
    """Nested dicts of leaves by path, as they are stored."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
