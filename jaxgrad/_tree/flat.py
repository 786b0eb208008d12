"""A flattened tree: its leaves by position, their paths, and the holes in it.

Leaves are identified by *position* and named by path; neither the tree nor its leaves change. The
hole that a leaf leaves in the other half is `None`, which JAX reads as an empty subtree:
`jax.grad`, `jax.jit` and Optax then do no work for it at all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from jaxgrad._text import count, listed
from jaxgrad._tree.nnx import nnx_types
from jaxgrad._tree.pattern import leaf_name

PyTree: TypeAlias = Any


@jax.tree_util.register_static
class Absent:
    """Stands in the second half for a `None` of the original tree.

    Without it a `None` that the tree always had (an unused bias, say) and the hole of a leaf
    that went missing look the same, and `merge` could not tell a complete tree from a partial one.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Absent)

    def __hash__(self) -> int:
        return hash(Absent)

    def __repr__(self) -> str:
        return "<None in the original>"


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree's leaves and holes in order: `treedef.unflatten(leaves)` is the tree.

    The paths are computed on first use: naming the leaves takes far longer than flattening the
    tree, and most calls never name one.
    """

    leaves: list[Any]
    treedef: Any
    named: list[str] | None = None

    @functools.cached_property
    def paths(self) -> list[str]:
        if self.named is not None:
            return self.named
        variable = nnx_types("Variable")
        nodes, _ = jax.tree_util.tree_flatten_with_path(
            self.treedef.unflatten(self.leaves),
            is_leaf=lambda x: is_hole(x) or isinstance(x, variable),
        )
        names = []
        for path, node in nodes:
            if isinstance(node, variable):  # its value goes by the Variable's path
                inner, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_hole)
                names += [leaf_name((*path, *rest)) for (_, *rest), _ in inner]
            else:
                names.append(leaf_name(path))
        return names


def is_hole(x: object) -> bool:
    """Whether `x` marks the place of a leaf that is in the other half."""
    return x is None or isinstance(x, Absent)


def is_array(x: object) -> bool:
    """Whether `x` is an array, or the shape of one."""
    return hasattr(x, "dtype")


def is_number(x: object) -> bool:
    """Whether `x` is a Python number, which stays one unless a pattern names it.

    Equinox's `Dropout` holds its rate and `inference` as leaves, which its code reads as Python
    values; as arrays they would be traced.
    """
    return isinstance(x, bool | int | float | complex) and not is_array(x)


def is_value(x: object) -> bool:
    """Whether `x` is an array or a Python number: a module also holds functions as leaves."""
    return is_array(x) or is_number(x)


def parameters(leaves: Sequence[object]) -> list[bool]:
    """Which leaves count as parameters: the arrays; in a tree without arrays, the numbers."""
    kind = is_array if any(map(is_array, leaves)) else is_number
    return [kind(leaf) for leaf in leaves]


def is_key(x: object) -> bool:
    """Whether `x` is a typed PRNG key, or an array of them."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def flatten(tree: PyTree) -> Flat:
    """Flattens a tree with holes as leaves."""
    return Flat(*jax.tree.flatten(tree, is_leaf=is_hole))


def variables(tree: PyTree, kind: str = "Variable") -> list[tuple[str, Any]]:
    """The NNX Variables of a kind among the nodes of a tree, by path."""
    kinds = nnx_types(kind)

    def stop(node: object) -> bool:
        return isinstance(node, kinds)

    if not any(map(stop, jax.tree.leaves(tree, is_leaf=stop))):
        return []
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)
    return [(leaf_name(path), node) for path, node in nodes if stop(node)]


def paths(tree: PyTree) -> list[str]:
    """Returns the path of every array in the tree, in the order of `jax.tree.leaves`.

    Args:
        tree: any pytree.

    Returns:
        Paths as `wrt` patterns match them: keys, attribute names and indices joined by `/`.
        The value of an NNX Variable goes by the Variable's path (`head/kernel`). Holes
        (`None`) have none, nor does a leaf that is not an array (a function or a number in an
        Equinox module); in a tree without arrays the Python numbers have paths.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> jg.paths({"head": {"bias": jnp.zeros(2)}, "layers": [jnp.ones(3), None]})
        ['head/bias', 'layers/0']

    Source: the names of `torch.nn.Module.named_parameters`, with `/` for `.`.
    """
    flat = flatten(tree)
    pairs = zip(flat.paths, parameters(flat.leaves), strict=True)
    return [path for path, is_parameter in pairs if is_parameter]


def halves(flat: Flat, chosen: Sequence[bool]) -> tuple[PyTree, PyTree]:
    """The tree of the chosen leaves and the tree of the others."""
    selected = [leaf if c else None for leaf, c in zip(flat.leaves, chosen, strict=True)]
    selected = [None if is_hole(leaf) else leaf for leaf in selected]
    rest = [
        Absent() if is_hole(leaf) else None if c else leaf
        for leaf, c in zip(flat.leaves, chosen, strict=True)
    ]
    return flat.treedef.unflatten(selected), flat.treedef.unflatten(rest)


def abstract(flat: Flat) -> Flat:
    """The same leaves by their shapes and dtypes alone."""

    def of(leaf: PyTree) -> PyTree:
        if is_hole(leaf) or not is_array(leaf):
            return leaf
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
        return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), dtype)

    return Flat([of(leaf) for leaf in flat.leaves], flat.treedef, flat.paths)


def check_same_structure(
    a: Flat, b: Flat, a_name: str, b_name: str, error: type[ValueError]
) -> None:
    """Raises, naming the paths, if two flattened trees differ in more than their leaves."""
    if a.treedef == b.treedef:
        return
    for here, there, have, lack in ((a, b, a_name, b_name), (b, a, b_name, a_name)):
        if extra := [f"'{path}'" for path in sorted({*here.paths} - {*there.paths})]:
            raise error(
                f"{have} has {count(extra, 'leaf', verb=False)} that {lack} lacks: "
                f"{listed(extra)}. Both must have the same structure, with None for a hole."
            )
    raise error(
        f"{a_name} and {b_name} have the same paths but different containers: "
        f"{a.treedef} and {b.treedef}. Build both from one tree."
    )
