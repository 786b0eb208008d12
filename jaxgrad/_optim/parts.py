"""What each array of an optimizer's state is, whatever stands around it.

Optax keeps a state as nested tuples in the order of the chain. Put a clip in front, or list the
groups in another order, and every path in the state is another, though each moment still belongs
to its leaf and each counter to the leaves that it counts for. So an array is named here by its
*kind*, the innermost named state and the field in it (`ScaleByAdamState.mu`), and by the leaf or
leaves that it serves, and never by an index in a chain or a list of groups.

A part of the state is a tree of one array per leaf (moments, sums, weights), which has the
container and the paths of the trained half; or a single array for several leaves (a counter, a
schedule's step, an injected learning rate). The leaves of a counter are those of the trees beside
it in its named state, or else those of its group, which `ParamGroupsState` knows.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxgrad._optim.param_groups import ParamGroupsState
from jaxgrad._tree.flat import PyTree, flatten, is_hole, is_number
from jaxgrad._tree.pattern import leaf_name


class Part(NamedTuple):
    """A part of an optimizer's state.

    Attributes:
        kind: the innermost named state and the field in it.
        serves: None for a tree of one array per leaf; for a single array the paths of the leaves
            that it serves, empty for all that are trained.
    """

    kind: str
    serves: tuple[str, ...] | None


class Slot(NamedTuple):
    """An array of an optimizer's state.

    Attributes:
        path: its path in the state.
        kind: see `Part`; below a leaf that has several arrays, with the path there.
        leaf: the leaf that it belongs to; None if it serves several.
        serves: the leaves that it serves.
    """

    path: str
    kind: str
    leaf: str | None
    serves: frozenset[str]


def parts_of(state: PyTree, trainable: PyTree) -> Mapping[str, Part]:
    """The parts of an optimizer's state, by the path of each part's root.

    Args:
        state: the state, of the transformation for `trainable`.
        trainable: the trained half of the parameters.
    """
    return _parts(jax.tree.structure(state), jax.tree.structure(trainable))


def slots_of(
    arrays: Iterator[str] | list[str], parts: Mapping[str, Part], trained: tuple[str, ...]
) -> list[Slot]:
    """What each array of a state is, given its path; in order.

    Args:
        arrays: the paths of the arrays.
        parts: the parts of the state.
        trained: the paths of the trained leaves.
    """
    return [_slot(path, parts, frozenset(trained)) for path in arrays]


def _slot(path: str, parts: Mapping[str, Part], trained: frozenset[str]) -> Slot:
    for root in _above(path):
        if root not in parts:
            continue
        kind, serves = parts[root]
        if serves is not None:
            return Slot(path, kind, None, frozenset(serves) or trained)
        inner = path[len(root) :].removeprefix("/")
        leaf = next((node for node in _above(inner) if node in trained), inner)
        return Slot(path, kind + inner[len(leaf) :], leaf, frozenset([leaf]))
    return Slot(path, path, None, trained)


def _above(path: str) -> Iterator[str]:
    """A path and those of the nodes above it, the root last."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


@functools.lru_cache(maxsize=8)  # a run saves states of one structure
def _parts(state: Any, trainable: Any) -> Mapping[str, Part]:
    # Numbers stand for the arrays: what a part is follows from the structure.
    tree = trainable.unflatten(range(trainable.num_leaves))
    walk = _Walk(tree)
    walk.visit(state.unflatten(range(state.num_leaves)), (), "", walk.trained)
    return walk.found


class _Walk:
    """Finds the parts of a state, from its root down."""

    def __init__(self, trainable: PyTree) -> None:
        flat = flatten(trainable)
        leaves = zip(flat.paths, flat.leaves, strict=True)
        self.trained = frozenset(path for path, leaf in leaves if is_number(leaf))
        self.container = type(trainable)
        self.found: dict[str, Part] = {}

    def visit(self, node: PyTree, keys: tuple[Any, ...], kind: str, serves: frozenset[str]) -> None:
        """Adds the parts at and below a node, which serves those leaves."""
        if is_hole(node):
            return
        if self.tree_of_leaves(node) is not None:
            self.found[leaf_name(keys)] = Part(kind, None)
        elif is_number(node):
            everything = serves == self.trained
            self.found[leaf_name(keys)] = Part(kind, () if everything else tuple(sorted(serves)))
        else:
            inner = self.served_by(node, serves)
            for key, child in _children(node):
                if isinstance(node, ParamGroupsState):
                    self.groups(node, (*keys, key), kind, serves)
                    break  # what follows the groups has no arrays
                self.visit(child, (*keys, key), _kind(kind, node, key), inner)

    def groups(
        self, node: ParamGroupsState, keys: tuple[Any, ...], kind: str, serves: frozenset[str]
    ) -> None:
        """Adds the parts of groups, each of which serves its own leaves."""
        for (key, state), leaves in zip(_children(node.groups), node.leaves, strict=False):
            self.visit(state, (*keys, key), kind, serves & frozenset(leaves))

    def served_by(self, node: PyTree, serves: frozenset[str]) -> frozenset[str]:
        """The leaves of the trees that stand beside each other in a named state, if any do."""
        if not _is_named(node):
            return serves
        trees = [self.tree_of_leaves(child) for _, child in _children(node)]
        return frozenset[str]().union(*filter(None, trees)) or serves

    def tree_of_leaves(self, node: PyTree) -> frozenset[str] | None:
        """The leaves of a tree with one array, or several, for each of them; None for another."""
        if type(node) is not self.container:
            return None
        paths = {p for p, x in zip(*_flat(node), strict=True) if not is_hole(x)}
        if not paths:
            return None
        if paths <= self.trained:
            return frozenset(paths)
        owners = {p: next((a for a in _above(p) if a in self.trained), None) for p in paths}
        if None in owners.values() or self.holds_tree(node):
            return None
        return frozenset(a for a in owners.values() if a is not None)

    def holds_tree(self, node: PyTree) -> bool:
        """Whether a named state, or a tree of exactly the trained leaves, is below a node."""
        return any(
            not is_hole(child) and (_is_named(child) or self.holds_tree(child))
            for _, child in ([] if is_number(node) else _children(node))
        )


def _flat(node: PyTree) -> tuple[list[str], list[Any]]:
    flat = flatten(node)
    return flat.paths, flat.leaves


def _children(node: PyTree) -> list[tuple[Any, PyTree]]:
    """The children of a node, with their keys."""
    found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(keys[0], child) for keys, child in found if keys]


def _is_named(node: PyTree) -> bool:
    return hasattr(node, "_fields") or hasattr(node, "__dataclass_fields__")


def _kind(kind: str, node: PyTree, key: Any) -> str:
    """The kind of a child: a named state starts it anew, a chain leaves it as it is."""
    if _is_named(node):
        return f"{type(node).__name__}.{leaf_name((key,))}"
    return kind if isinstance(key, jax.tree_util.SequenceKey) else f"{kind}/{leaf_name((key,))}"
