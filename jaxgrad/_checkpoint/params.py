"""Parameters on disk: saved by path with Orbax, and read back only where they fit.

The record beside the arrays says what was trained. The directory of a run that `fit` keeps is read
like any other checkpoint, by one of its steps.
"""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import jax

from jaxgrad._checkpoint.arrays import check_fit, encode, nest, read, write
from jaxgrad._checkpoint.record import CheckpointError, Json, Record
from jaxgrad._checkpoint.run import Parameters, is_run, params_of
from jaxgrad._tree.flat import PyTree, flatten, is_value
from jaxgrad._tree.select import partition, resolve, select
from jaxgrad._tree.wrt import Wrt

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
    config: Mapping[str, Json]


def save(
    path: str | PathLike[str],
    params: PyTree,
    *,
    wrt: Wrt | None = None,
    trained: Wrt | None = None,
    config: Mapping[str, Json] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves parameters as an Orbax checkpoint, complete or not at all.

    Each array has a checksum. Of several processes (`jax.distributed`) all call it.

    Args:
        path: the directory to make.
        params: any pytree with named leaves; its arrays, numbers and PRNG keys are saved in their
            dtypes.
        wrt: which leaves to save; see `select`. All of them by default.
        trained: which leaves of `params` were trained, for the record; see `select`.
        config: anything that JSON can hold, for the record.
        overwrite: replace an existing checkpoint, once the new one is complete.

    Raises:
        CheckpointError: `path` exists, two leaves have one path or one is below the other, a
            leaf has none, or JSON can't hold `config`.
        SelectionError: see `select`.
        OSError: the directory can't be written.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((2, 3)), "trunk": [jnp.zeros(4)]}
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, params, trained="head")
        >>> jg.inspect(path).trained
        ('head',)
        >>> jg.save(path, params, wrt="head", overwrite=True)
        >>> list(jg.inspect(path).leaves)
        ['head']

    Source: `torch.save(model.state_dict(), path)`.
    """
    path = Path(path).absolute()
    refuse_taken(path, overwrite)
    tree = encode(params if wrt is None else partition(params, wrt)[0])
    if not tree.arrays:
        raise CheckpointError("a checkpoint holds arrays, and this tree has none with an element.")
    names = () if trained is None else tuple(select(params, trained).paths)
    record = Record(trained=names, config=dict(config or {}))
    try:
        record.to_json()
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"config holds what JSON can't: {e}. {config!r}") from e
    write(path, tree, record, orbax=True)


@overload
def load(
    path: str | PathLike[str],
    into: None = None,
    *,
    wrt: Wrt | None = None,
    step: int | Literal["best"] | None = None,
) -> dict[str, Any]: ...


@overload
def load(
    path: str | PathLike[str],
    into: T,
    *,
    wrt: Wrt | None = None,
    step: int | Literal["best"] | None = None,
) -> T: ...


def load(
    path: str | PathLike[str],
    into: PyTree = None,
    *,
    wrt: Wrt | None = None,
    step: int | Literal["best"] | None = None,
) -> PyTree:
    """Returns parameters read from a checkpoint.

    Args:
        path: the directory of the checkpoint, or of a run (see `Checkpoints`).
        into: a tree of the structure, shapes and dtypes to read; arrays or
            `jax.ShapeDtypeStruct`s. It is left as it is. Without it, the checkpoint decides.
        wrt: which leaves to read; see `select`. With `into`, its other leaves stay, and the
            checkpoint may lack them, or have others.
        step: of a run, the step to read: None for the newest; "best" for the best of those that
            are saved, by the `metric` and `mode` of its `Checkpoints`.

    Returns:
        With `into`, a tree of its structure: a Python number stays one, and leaves that are not
        arrays are those of `into`. Without it, the leaves in nested dicts, one level for each part
        of a path: `layers/0/bias` is `["layers"]["0"]["bias"]`, a string even for the index of a
        list. Only what `wrt` selects is in them.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is not a checkpoint, or a damaged one; paths, a shape or a dtype differ
            (all are named); JAX can't hold a dtype as it is set up (64 bits); or there is no such
            step.
        SelectionError: `wrt` does not fit `into`, or the checkpoint; see `select`.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((2, 3)), "layers": [jnp.zeros(4)]}
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, params)
        >>> jg.load(path, into=jax.tree.map(jnp.zeros_like, params))["head"].sum()
        Array(6., dtype=float32)
        >>> jg.load(path, wrt="layers/**")
        {'layers': {'0': Array([0., 0., 0., 0.], dtype=float32)}}
        >>> other = {"head": jnp.zeros((2, 3)), "body": jnp.ones(5)}
        >>> jg.load(path, into=other, wrt="head")["body"].sum()
        Array(5., dtype=float32)

    Source: `model.load_state_dict(torch.load(path))`.
    """
    path = Path(path).absolute()
    params = _params(path, step)
    held = params.shapes()
    flat = flatten(nest(held) if into is None else into)
    chosen = [True] * len(flat.leaves) if wrt is None else resolve(flat, wrt).flags
    wanted = {
        p: x for p, x, c in zip(flat.paths, flat.leaves, chosen, strict=True) if c and is_value(x)
    }
    if into is None:
        return nest(params.load(None if wrt is None else wanted))
    check_fit(path, held if wrt is None else {p: held[p] for p in wanted if p in held}, wanted)
    leaves = params.load(None if wrt is None else wanted)
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
            run, whose newest step counts.

    Returns:
        A `CheckpointInfo`.

    Raises:
        FileNotFoundError: there is no such directory.
        CheckpointError: it is not a checkpoint, or a damaged one.

    Example:
        >>> import tempfile, jax.numpy as jnp, jaxgrad as jg
        >>> path = tempfile.mkdtemp() + "/model"
        >>> jg.save(path, {"head": jnp.ones((2, 3))}, config={"classes": 3})
        >>> info = jg.inspect(path)
        >>> info.leaves["head"].shape, info.config
        ((2, 3), {'classes': 3})

    Source: `torch.load(path, map_location="meta")`.
    """
    params = _params(Path(path).absolute(), None)
    return CheckpointInfo(params.shapes(), params.record.trained, params.record.config)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raises if `save` would; a long run asks before it starts."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"'{path}' exists. Choose another path, or pass overwrite=True.")
    if path.exists() and not (path / "_CHECKPOINT_METADATA").is_file():
        raise CheckpointError(
            f"'{path}' exists and is not a checkpoint, so it is not replaced. Choose another path."
        )


def _params(path: Path, step: int | Literal["best"] | None) -> Parameters:
    if is_run(path):
        return params_of(path, step)
    stored = read(path)
    if step is not None:
        raise CheckpointError(
            f"step={step!r}: '{path}' is not the directory of a run, so it has no steps. Load it "
            "without step=."
        )
    return Parameters(stored.record, [(stored, "")])


def _like(template: object, leaf: jax.Array) -> Any:
    """A leaf as the tree had it: a Python number stays one."""
    return leaf if hasattr(template, "dtype") else leaf.item()
