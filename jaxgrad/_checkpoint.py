"""Parameters on disk: saved by path with Orbax, and read back only where they fit.

A tree is stored as nested dicts of its paths, so that the file doesn't depend on the class
of the model, and anything that reads Orbax checkpoints reads it. What was trained is stored
beside it. Orbax casts dtypes in silence and reports a wrong structure far from its cause, so
paths, shapes and dtypes are compared before it is asked to load. What it can't hold goes into its
record: the kind of a PRNG key, the shape of an array without elements.
"""

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._messages import listed, nearest, numel, spec
from jaxgrad._select import PyTree, Wrt, flatten, is_array, is_key, partition, paths

T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read, or put into the tree; the message says why."""

    __module__ = "jaxgrad"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds.

    Attributes:
        leaves: shape and dtype of each array, by path.
        trained: the paths that were trained.
        config: what was stored with it.
    """

    leaves: Mapping[str, jax.ShapeDtypeStruct]
    trained: tuple[str, ...]
    config: Mapping[str, Any]


def save(
    path: str | PathLike[str],
    params: PyTree,
    *,
    wrt: Wrt | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves parameters as an Orbax checkpoint, whole or not at all.

    Args:
        path: the directory to make.
        params: any pytree with named leaves; its arrays, numbers and PRNG keys are saved in their
            dtypes.
        wrt: which of them were trained, for the record; see `select`.
        config: anything that JSON can hold, for the record.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        CheckpointError: `path` exists, two leaves have one path or one is below the other, a
            leaf has none, or JSON can't hold `config`.
        SelectionError: see `select`.
        OSError: the directory can't be written.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((2, 3)), "trunk": [jnp.zeros(4)]}
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, params, wrt="head")
        >>> jg.inspect(path).trained
        ('head',)

    Source: `torch.save(model.state_dict(), path)`.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(path).absolute()
    refuse_taken(path, overwrite)
    trained = [] if wrt is None else paths(partition(params, wrt)[0])
    arrays, record = encode(params)
    record |= {"trained": trained, "config": dict(config or {})}
    try:
        json.dumps(record)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"config holds what JSON can't: {e}. {config!r}") from e
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        ocp.save(str(new), nest(arrays), custom_metadata=record)
        _replace(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load(path: str | PathLike[str], into: T) -> T:
    """Returns a tree with its arrays read from a checkpoint.

    Args:
        path: the directory of the checkpoint.
        into: a tree of the structure, shapes and dtypes to read; arrays or
            `jax.ShapeDtypeStruct`s. It is left as it is.

    Returns:
        A tree of the structure of `into`. A Python number stays one; leaves that are no arrays
        are those of `into`.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is no checkpoint, paths, a shape or a dtype differ (all are named), or
            JAX can't hold a dtype as it is set up (64 bits).

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((2, 3))}
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, params)
        >>> jg.load(path, into=jax.tree.map(jnp.zeros_like, params))["head"].sum()
        Array(6., dtype=float32)

    Source: `model.load_state_dict(torch.load(path))`.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(path).absolute()
    found, record = _read(path)
    flat = flatten(into)
    wanted = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)}
    _check_fit(path, _leaves(found, record), wanted)
    loaded = flatten(ocp.load(str(path), nest(_on_device(found))))
    arrays = dict(zip(loaded.paths, loaded.leaves, strict=True))
    for p, x in arrays.items():  # Orbax reads in threads, where `with jax.enable_x64` is not seen
        if x.dtype != found[p].dtype:
            raise CheckpointError(
                f"'{p}' is {spec(found[p])} in '{path}', and JAX reads {x.dtype}. Load it after "
                "jax.config.update('jax_enable_x64', True)."
            )
    decoded = decode(arrays, record)
    return flat.treedef.unflatten(
        [
            _like(x, decoded[p]) if is_array(x) else x
            for p, x in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def inspect(path: str | PathLike[str]) -> CheckpointInfo:
    """Returns what a checkpoint holds, without reading its arrays.

    Args:
        path: the directory of the checkpoint: of jaxgrad, or any tree that Orbax saved.

    Returns:
        A `CheckpointInfo`.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is no checkpoint.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxgrad as jg
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, {"head": jnp.ones((2, 3))}, config={"classes": 3})
        >>> info = jg.inspect(path)
        >>> info.leaves["head"].shape, info.config
        ((2, 3), {'classes': 3})

    Source: `torch.load(path, map_location="meta")`.
    """
    found, record = _read(Path(path).absolute())
    return CheckpointInfo(
        _leaves(found, record), tuple(record.get("trained", ())), record.get("config", {})
    )


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raises where `save` would; a long run asks before it starts."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists. Choose another path, or pass overwrite=True.")
    if path.exists() and not (path / "_CHECKPOINT_METADATA").is_file():
        raise CheckpointError(
            f"'{path}' exists and is no checkpoint, so it is not replaced. Choose another path."
        )


def _replace(new: Path, path: Path) -> None:
    """Renames a directory over another; at no moment is there a part of either at `path`."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def encode(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that Orbax stores for a tree, by path, and the record of what it can't."""
    flat = flatten(tree)
    named = [(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)]
    _refuse_names([path for path, _ in named])
    if not any(map(numel, dict(named).values())):
        raise CheckpointError("a checkpoint holds arrays, and this tree has none with an element.")
    arrays, keys, empty = {}, {}, {}
    for path, leaf in named:
        if is_key(leaf):
            keys[path] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        elif not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf, jnp.result_type(leaf))
        elif isinstance(leaf, np.generic):
            leaf = np.asarray(leaf)
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


def _leaves(
    found: Mapping[str, jax.ShapeDtypeStruct], record: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what `decode` returns, read off without the arrays."""
    with jax.enable_x64(True):  # a float64 in the file is one, whatever JAX is set up to hold
        return jax.eval_shape(lambda arrays: decode(arrays, record), dict(found))


def _read(path: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """The arrays that Orbax has stored, and our record beside them."""
    from orbax.checkpoint import v1 as ocp

    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': there is no such directory.")
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


def _on_device(found: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for path, x in found.items()
    }


def _like(template: Any, leaf: jax.Array) -> Any:
    """A leaf as the tree had it: a Python number stays one."""
    return leaf if hasattr(template, "dtype") else leaf.item()


def _check_fit(path: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
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
