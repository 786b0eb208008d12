"""A `wrt` resolved against a tree, once: which leaves, as a value to hand on.

PyTorch keeps `requires_grad` on the tensor, so what is trained is spread over the model's state.
Here it is one value that gradients, optimizers, staging and checkpoints share. It holds paths,
shapes and flags but no array, so it keeps no memory alive and may cross the boundary of a `jit`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jaxgrad._text import count, numel, spec
from jaxgrad._tree.flat import (
    Absent,
    Flat,
    PyTree,
    check_same_structure,
    flatten,
    halves,
    is_array,
    is_hole,
    is_number,
    is_value,
)
from jaxgrad._tree.merge import merge

T = TypeVar("T")


class SelectionError(ValueError):
    """A `wrt` that does not fit the tree: the message names the pattern or path, and the fix."""

    __module__ = "jaxgrad"


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Selection:
    """Which leaves of a tree are selected; made by `select`, and itself a `wrt`.

    Attributes:
        flat: paths, shapes and structure of the tree; no arrays.
        flags: whether each position of `flat` is selected. A hole counts as the leaf that it was.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones((3, 2)), "trunk": jnp.ones(14)}
        >>> selection = jg.select(params, "head")
        >>> selection
        <Selection: 6 of 20 elements (30%), in 1 of 2 leaves>
        >>> selection.paths
        ['head']
        >>> jg.grad(lambda p: jnp.sum(p["head"]), wrt=selection)(params)["trunk"] is None
        True

    Source: the set of parameters that `requires_grad`.
    """

    flat: Flat
    flags: tuple[bool, ...]

    @property
    def paths(self) -> list[str]:
        """The paths of the selected leaves, in the order of `jax.tree.leaves`."""
        pairs = zip(self.flat.paths, self.flat.leaves, self.flags, strict=True)
        return [path for path, leaf, flag in pairs if flag and is_value(leaf)]

    @property
    def mask(self) -> PyTree:
        """A tree of `bool` of the structure of the tree, as Optax takes masks; holes stay holes."""
        pairs = zip(self.flat.leaves, self.flags, strict=True)
        return self.flat.treedef.unflatten([x if is_hole(x) else flag for x, flag in pairs])

    def split(self, tree: T) -> tuple[T, T]:
        """Returns the selected leaves of a tree of this structure, and the rest; see `partition`.

        Raises:
            SelectionError: the tree has another structure.
        """
        return halves(self.named(tree), self.flags)

    def merge(self, *trees: T) -> T:
        """Returns the tree of all leaves; see `jaxgrad.merge`."""
        return merge(*trees)

    def map(self, fun: Callable[[Any], Any], tree: T) -> T:
        """Applies `fun` to each selected leaf of a tree of this structure; the rest stay.

        Raises:
            SelectionError: the tree has another structure.

        Example:
            >>> import jax.numpy as jnp, jaxgrad as jg
            >>> params = {"head": jnp.ones(2), "trunk": jnp.ones(2)}
            >>> print(jg.select(params, "head").map(jnp.zeros_like, params)["head"])
            [0. 0.]
        """
        flat = self.named(tree)
        leaves = [
            fun(x) if flag and not is_hole(x) else None if isinstance(x, Absent) else x
            for x, flag in zip(flat.leaves, self.flags, strict=True)
        ]
        return flat.treedef.unflatten(leaves)

    def named(self, tree: PyTree) -> Flat:
        """Flattens a tree of this structure; unlike `flatten` it reuses the paths."""
        flat = flatten(tree)
        check_same_structure(self.flat, flat, "the selection", "the tree", SelectionError)
        return dataclasses.replace(flat, named=self.flat.paths)

    def __repr__(self) -> str:
        pairs = zip(self.flat.leaves, self.flags, strict=True)
        arrays = [(x, flag) for x, flag in pairs if is_array(x) or (flag and is_number(x))]
        taken = [x for x, flag in arrays if flag]
        some, every = sum(map(numel, taken)), sum(numel(x) for x, _ in arrays)
        share = f" ({100 * some / every:.3g}%)" if every else ""
        leaves = f"{len(taken)} of {count(arrays, 'leaf', verb=False)}"
        return f"<Selection: {some:,} of {every:,} elements{share}, in {leaves}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        shapes = tuple(spec(x) if is_value(x) else "" for x in self.flat.leaves)
        return tuple(self.flat.paths), shapes, self.flags, self.flat.treedef
