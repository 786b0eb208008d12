"""Arrays on disk by path: what every checkpoint is made of.

A tree is stored as nested dicts of its paths, so that the file doesn't depend on the class of the
model, and anything that reads Orbax checkpoints reads it. Orbax casts dtypes in silence and reports
a wrong structure far from its cause, so paths, shapes and dtypes are compared here. What it can't
hold goes into a record beside the arrays: the kind of a PRNG key, the shape of an array without
elements.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._messages import listed, nearest, spec
from jaxgrad._processes import several
from jaxgrad._select import PyTree, flatten, is_array, is_key
from jaxgrad._sharding import ShardingOf, on_one_device


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read, or put into the tree; the message says why."""

    __module__ = "jaxgrad"


def encode(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that Orbax stores for a tree, by path, and the record of what it can't."""
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


def read(path: Path) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
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


def load_arrays(path: Path, sharding_of: ShardingOf = on_one_device) -> dict[str, jax.Array]:
    """The arrays that Orbax has stored, by path, each in its place."""
    from orbax.checkpoint import v1 as ocp

    found, _ = read(path)
    abstract = {
        p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(p, x.shape))
        for p, x in found.items()
    }
    loaded = flatten(ocp.load(str(path), nest(abstract)))
    arrays = dict(zip(loaded.paths, loaded.leaves, strict=True))
    for p, x in arrays.items():  # Orbax reads in threads, where `with jax.enable_x64` is not seen
        if x.dtype != found[p].dtype:
            raise CheckpointError(
                f"'{p}' is {spec(found[p])} in '{path}', and JAX reads {x.dtype}. Load it after "
                "jax.config.update('jax_enable_x64', True)."
            )
    return arrays


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
