"""Parameters on disk: saved by path with Orbax, and read back only where they fit.

What was trained is stored beside the arrays. The directory of a run that `fit` keeps is read like
any other checkpoint: by its newest step.
"""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxgrad._checkpoint.arrays import check_fit, encode, read, write
from jaxgrad._checkpoint.record import CheckpointError, Record
from jaxgrad._checkpoint.run import Parameters, is_run, params_of
from jaxgrad._tree.flat import PyTree, flatten, is_array, paths
from jaxgrad._tree.select import partition
from jaxgrad._tree.wrt import Wrt, match

T = TypeVar("T")


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

    Of several processes (`jax.distributed`) all call it, and the first renames what is complete.

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
    path = Path(path).absolute()
    refuse_taken(path, overwrite)
    trained = () if wrt is None else tuple(paths(partition(params, wrt)[0]))
    tree = encode(params)
    if not tree.arrays:
        raise CheckpointError("a checkpoint holds arrays, and this tree has none with an element.")
    record = Record(trained=trained, config=dict(config or {}))
    try:
        record.to_json()
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"config holds what JSON can't: {e}. {config!r}") from e
    write(path, tree, record, orbax=True)


def load(path: str | PathLike[str], into: T, *, only: Wrt | None = None) -> T:
    """Returns a tree with its arrays read from a checkpoint.

    Args:
        path: the directory of the checkpoint, or of a run (see `Checkpoints`), whose newest step
            is read.
        into: a tree of the structure, shapes and dtypes to read; arrays or
            `jax.ShapeDtypeStruct`s. It is left as it is.
        only: which of its leaves to read; see `select`. The others stay, and the checkpoint
            may lack them, or have others.

    Returns:
        A tree of the structure of `into`. A Python number stays one; leaves that are no arrays
        are those of `into`.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is no checkpoint, paths, a shape or a dtype differ (all are named), or
            JAX can't hold a dtype as it is set up (64 bits).
        SelectionError: `only` does not fit `into`; see `select`.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((2, 3))}
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, params)
        >>> jg.load(path, into=jax.tree.map(jnp.zeros_like, params))["head"].sum()
        Array(6., dtype=float32)
        >>> other = {"head": jnp.zeros((2, 3)), "trunk": jnp.zeros(4)}
        >>> jg.load(path, into=other, only="head")["trunk"].sum()
        Array(0., dtype=float32)

    Source: `model.load_state_dict(torch.load(path))`.
    """
    path = Path(path).absolute()
    params = _params(path)
    held = params.shapes()
    flat = flatten(into)
    chosen = [True] * len(flat.paths) if only is None else match(flat, only)
    wanted = {
        p: x for p, x, c in zip(flat.paths, flat.leaves, chosen, strict=True) if c and is_array(x)
    }
    check_fit(path, held if only is None else {p: held[p] for p in wanted if p in held}, wanted)
    leaves = params.load(None if only is None else wanted)
    return flat.treedef.unflatten(
        [
            _like(x, leaves[p]) if p in wanted else x
            for p, x in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def inspect(path: str | PathLike[str]) -> CheckpointInfo:
    """Returns what a checkpoint holds, without reading its arrays.

    Args:
        path: the directory of the checkpoint: of jaxgrad, or any tree that Orbax saved; or of a
            run, whose newest step is told.

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
    params = _params(Path(path).absolute())
    return CheckpointInfo(params.shapes(), params.record.trained, params.record.config)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raises where `save` would; a long run asks before it starts."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists. Choose another path, or pass overwrite=True.")
    if path.exists() and not (path / "_CHECKPOINT_METADATA").is_file():
        raise CheckpointError(
            f"'{path}' exists and is no checkpoint, so it is not replaced. Choose another path."
        )


def _params(path: Path) -> Parameters:
    if is_run(path):
        return params_of(path)
    stored = read(path)
    return Parameters(stored.record, [(stored, "")])


def _like(template: Any, leaf: jax.Array) -> Any:
    """A leaf as the tree had it: a Python number stays one."""
    return leaf if hasattr(template, "dtype") else leaf.item()
