"""Parameters on disk: saved by path with Orbax, and read back only where they fit.

A tree is stored as nested dicts of its paths, so that the file doesn't depend on the class
of the model, and anything that reads Orbax checkpoints reads it. What was trained is stored
beside it. Orbax casts dtypes in silence and reports a wrong structure far from its cause, so
paths, shapes and dtypes are compared before it is asked to load.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxgrad._messages import listed, nearest, spec
from jaxgrad._select import PyTree, Wrt, flatten, is_array, partition, paths

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
        params: any pytree with named leaves; its arrays are saved in their dtypes.
        wrt: which of them were trained, for the record; see `select`.
        config: anything that JSON can hold, for the record.
        overwrite: replace a checkpoint that is there, once the new one is complete.

    Raises:
        CheckpointError: `path` exists, two leaves have one path, or a leaf has none.
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
    tree = _nested(params)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        record: Any = {"trained": trained, "config": dict(config or {})}
        ocp.save(str(new), tree, custom_metadata=record)
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
        A tree of the structure of `into`. Leaves that are no arrays are those of `into`.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is no checkpoint, or paths, a shape or a dtype differ (all are named).

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

    info = inspect(path)
    flat = flatten(into)
    wanted = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)}
    _check_fit(Path(path), info.leaves, wanted)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        p: jax.ShapeDtypeStruct(jnp.shape(x), info.leaves[p].dtype, sharding=device)
        for p, x in wanted.items()
    }
    loaded = flatten(ocp.load(str(Path(path).absolute()), nest(abstract)))
    arrays = dict(zip(loaded.paths, loaded.leaves, strict=True))
    return flat.treedef.unflatten(
        [
            arrays.get(p, x) if is_array(x) else x
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
    from orbax.checkpoint import v1 as ocp

    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at '{path}': there is no such directory.")
    try:
        found = ocp.metadata(str(path))
    except (ValueError, OSError, KeyError) as e:  # what Orbax raises for what is none, or damaged
        raise CheckpointError(f"'{path}' is no Orbax checkpoint, or a damaged one.") from e
    flat = flatten(found.metadata)
    extra: Any = found.custom_metadata or {}
    return CheckpointInfo(
        {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype)
            for p, x in zip(flat.paths, flat.leaves, strict=True)
            if hasattr(x, "shape")
        },
        tuple(extra.get("trained", ())),
        extra.get("config", {}),
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


def _nested(params: PyTree) -> dict[str, Any]:
    flat = flatten(params)
    named = [(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)]
    leaves = dict(named)
    if len(leaves) != len(named) or "" in leaves or not leaves:
        raise CheckpointError(
            "a checkpoint holds arrays by path, and this tree has "
            + (
                "no array"
                if not leaves
                else "one without a name"
                if "" in leaves
                else "two of one path"
            )
            + '. Save a tree like {"kernel": array}.'
        )
    return nest(leaves)


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
