"""Which leaves: from a `wrt` to a boolean tree, and from that to two halves of a tree.

PyTorch keeps `requires_grad` on the tensor, so what is trained is spread over the model's
state. Here it is one value, `wrt`, that is given to whatever needs it. A tree is taken apart
by the *position* of its leaves and named by their paths; neither the tree nor its leaves
change, so the same `wrt` serves gradients, optimizers, staging and checkpoints.

The hole that a leaf leaves in the other half is `None`, which JAX reads as an empty subtree:
`jax.grad`, `jax.jit` and Optax then do no work for it at all.
"""

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from jaxgrad._messages import count, listed, nearest

T = TypeVar("T")
PyTree: TypeAlias = Any
Wrt: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool] | PyTree
"""What to differentiate or train: a glob, a list of globs, a predicate, or a boolean tree."""


class SelectionError(ValueError):
    """A `wrt` that does not fit the tree: the message names the pattern or path, and the fix."""

    __module__ = "jaxgrad"


class MergeError(ValueError):
    """Halves that do not make up one tree: the message names the paths at fault."""

    __module__ = "jaxgrad"


@jax.tree_util.register_static
class _Absent:
    """Stands in the second half for a `None` of the original tree.

    Without it a `None` that the tree always had (an unused bias, say) and the hole of a leaf
    that went missing look the same, and `merge` could not tell a whole tree from a torn one.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Absent)

    def __hash__(self) -> int:
        return hash(_Absent)

    def __repr__(self) -> str:
        return "<None in the original>"


class Flat(NamedTuple):
    """A tree's leaves and holes in order: `treedef.unflatten(leaves)` is the tree."""

    paths: list[str]
    leaves: list[Any]
    treedef: Any


def is_hole(x: Any) -> bool:
    """Whether `x` marks the place of a leaf that is in the other half."""
    return x is None or isinstance(x, _Absent)


def is_array(x: Any) -> bool:
    """Whether `x` can be selected: an Equinox module also holds functions and names as leaves."""
    return hasattr(x, "dtype") or isinstance(x, bool | int | float | complex)


def is_key(x: Any) -> bool:
    """Whether `x` is a typed PRNG key, or an array of them."""
    return hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def nnx_types(*names: str) -> tuple[type, ...]:
    """Classes of `flax.nnx`, or none of them where nobody has loaded Flax.

    An NNX object can't exist before Flax is loaded, so asking for its class never has to pay
    for the import.
    """
    nnx = sys.modules.get("flax.nnx")
    # Half-way through its own import, the module lacks some of its names.
    return tuple(getattr(nnx, name) for name in names if hasattr(nnx, name))


def flatten(tree: PyTree) -> Flat:
    """Flattens a tree with holes as leaves; an NNX Variable's value goes by the Variable's path."""
    variable = nnx_types("Variable")
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: is_hole(x) or isinstance(x, variable)
    )
    paths, leaves = [], []
    for path, node in nodes:
        if isinstance(node, variable):
            inner, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_hole)
            paths += [_name((*path, *rest)) for (_, *rest), _ in inner]
            leaves += [leaf for _, leaf in inner]
        else:
            paths.append(_name(path))
            leaves.append(node)
    return Flat(paths, leaves, jax.tree.structure(tree, is_leaf=is_hole))


def paths(tree: PyTree) -> list[str]:
    """Returns the path of every array in the tree, in the order of `jax.tree.leaves`.

    Args:
        tree: any pytree.

    Returns:
        Paths as `wrt` patterns match them: keys, attribute names and indices joined by `/`.
        The value of an NNX Variable goes by the Variable's path (`head/kernel`). Holes
        (`None`) have none, nor has a leaf that is no array (a function in an Equinox module).

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> jg.paths({"head": {"bias": jnp.zeros(2)}, "layers": [jnp.ones(3), None]})
        ['head/bias', 'layers/0']

    Source: the names of `torch.nn.Module.named_parameters`, with `/` for `.`.
    """
    flat = flatten(tree)
    return [path for path, leaf in zip(flat.paths, flat.leaves, strict=True) if is_array(leaf)]


def select(tree: T, wrt: Wrt) -> T:
    """Returns the boolean tree that says which leaves `wrt` selects.

    Args:
        tree: any pytree: a Linen dict, an NNX State or module, an Equinox module, a dataclass,
            nested lists, an Optax state.
        wrt: one of

            - a glob over paths: `*` matches within a level, `**` across levels (none included),
              `?` one character, `[ab]` one of a set; `"!embed/**"` excludes: everything but;
            - a list of globs: the leaves that one of them matches (all leaves, where the list
              only excludes) and that no exclusion matches;
            - a predicate `(path, leaf) -> bool`;
            - a tree of booleans: each decides its own path and all below it.

            A leaf that is no array (a function in an Equinox module) is never selected.

    Returns:
        A tree of `bool` of the structure of `tree`; its holes stay holes.

    Raises:
        SelectionError: a pattern matches no leaf (the nearest paths are named), nothing is
            selected, a boolean tree does not fit, or an NNX parameter is tied: it stands at two
            paths, whose copies would each get a part of the gradient. A module that is itself an
            argument of `jax.jit` has lost its ties before anything can see them: tied models
            take `functional`.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> head = {"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}
        >>> params = {"head": head, "trunk": jnp.ones(3)}
        >>> jg.select(params, ["head/**", "!**/bias"])
        {'head': {'bias': False, 'kernel': True}, 'trunk': False}
        >>> jg.select(params, lambda path, leaf: leaf.ndim == 1)
        {'head': {'bias': True, 'kernel': False}, 'trunk': True}
        >>> jg.select(params, {"head": True, "trunk": False})
        {'head': {'bias': True, 'kernel': True}, 'trunk': False}

    Source: `for p in module.parameters(): p.requires_grad_(...)`.
    """
    flat, chosen = _select(tree, wrt)
    holes = (is_hole(leaf) for leaf in flat.leaves)
    return flat.treedef.unflatten(
        [leaf if hole else c for leaf, hole, c in zip(flat.leaves, holes, chosen, strict=True)]
    )


def partition(tree: T, wrt: Wrt) -> tuple[T, T]:
    """Splits a tree into the selected leaves and the rest, each with holes for the other.

    Args:
        tree: any pytree.
        wrt: the leaves of the first half; see `select`.

    Returns:
        `(selected, rest)`, both of the structure of `tree` with `None` in place of the leaves
        that are in the other half. `merge(selected, rest)` is the tree again.

    Raises:
        SelectionError: as `select`.

    Example:
        >>> import jaxgrad as jg
        >>> jg.partition({"head": 1.0, "trunk": [2.0, 3.0]}, "head")
        ({'head': 1.0, 'trunk': [None, None]}, {'head': None, 'trunk': [2.0, 3.0]})

    Source: Equinox's `partition`, by path.
    """
    return halves(*_select(tree, wrt))


def merge(*trees: T) -> T:
    """Puts the halves of a tree together again.

    Args:
        *trees: trees of one structure; each leaf is in exactly one of them, and a hole in
            all others.

    Returns:
        The tree of all leaves.

    Raises:
        MergeError: the structures differ, a leaf is in two trees, or in none.

    Example:
        >>> import jaxgrad as jg
        >>> jg.merge({"head": 1.0, "trunk": None}, {"head": None, "trunk": 2.0})
        {'head': 1.0, 'trunk': 2.0}
        >>> jg.merge({"head": 1.0, "trunk": None}, {"head": 3.0, "trunk": 2.0})
        Traceback (most recent call last):
            ...
        jaxgrad.MergeError: 1 leaf is in more than one tree: 'head' (in trees 0 and 1). ...

    Source: Equinox's `combine`, which lets the first of two leaves win unseen.
    """
    if not trees:
        raise TypeError("merge() needs at least one tree")
    flats = [flatten(tree) for tree in trees]
    for i, flat in enumerate(flats[1:], 1):
        check_same_structure(flats[0], flat, "tree 0", f"tree {i}", MergeError)
    first = flats[0]
    merged, twice, missing = [], [], []
    for path, *column in zip(first.paths, *(flat.leaves for flat in flats), strict=True):
        found = [i for i, leaf in enumerate(column) if not is_hole(leaf)]
        if len(found) > 1:
            twice.append(f"'{path}' (in trees {' and '.join(map(str, found))})")
        elif not found and not any(isinstance(leaf, _Absent) for leaf in column):
            missing.append(f"'{path}'")
        merged.append(column[found[0]] if found else None)
    if twice:
        raise MergeError(
            f"{count(twice, 'leaf')} in more than one tree: {listed(twice)}. "
            "Halves that were split by the same `wrt` do not overlap."
        )
    if missing:
        raise MergeError(
            f"{count(missing, 'leaf')} in none of the {len(trees)} trees: {listed(missing)}. "
            "Pass every half; where None is the value meant, take the halves from `partition`."
        )
    return first.treedef.unflatten(merged)


# What the rest of the package builds on.


def match(flat: Flat, wrt: Wrt) -> list[bool]:
    """Which positions of a flattened tree `wrt` takes; holes count, as they once were leaves."""
    if isinstance(wrt, str):
        chosen = _match_globs(flat, [wrt])
    elif isinstance(wrt, list | tuple) and wrt and all(isinstance(w, str) for w in wrt):
        chosen = _match_globs(flat, wrt)
    elif callable(wrt) and jax.tree_util.all_leaves([wrt]):  # not a module that is callable
        chosen = [
            is_array(leaf) and _decision(wrt(path, leaf), path)
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    else:
        chosen = _match_prefix(flat, flatten(wrt))
    return [
        c and (is_hole(leaf) or is_array(leaf)) for c, leaf in zip(chosen, flat.leaves, strict=True)
    ]


def halves(flat: Flat, chosen: Sequence[bool]) -> tuple[PyTree, PyTree]:
    """The tree of the chosen leaves and the tree of the others."""
    selected = [leaf if c else None for leaf, c in zip(flat.leaves, chosen, strict=True)]
    selected = [None if is_hole(leaf) else leaf for leaf in selected]
    rest = [
        _Absent() if is_hole(leaf) else None if c else leaf
        for leaf, c in zip(flat.leaves, chosen, strict=True)
    ]
    return flat.treedef.unflatten(selected), flat.treedef.unflatten(rest)


def check_same_structure(
    a: Flat, b: Flat, a_name: str, b_name: str, error: type[ValueError]
) -> None:
    """Raises, naming the paths, where two flattened trees differ in more than their leaves."""
    if a.treedef == b.treedef:
        return
    for here, there, have, lack in ((a, b, a_name, b_name), (b, a, b_name, a_name)):
        if extra := [f"'{path}'" for path in sorted({*here.paths} - {*there.paths})]:
            raise error(
                f"{have} has {count(extra, 'leaf', verb=False)} that {lack} has not: "
                f"{listed(extra)}. Both must have one structure, with None for a hole."
            )
    raise error(
        f"{a_name} and {b_name} have the same paths but other containers: "
        f"{a.treedef} against {b.treedef}. Build both from one tree."
    )


def _select(tree: PyTree, wrt: Wrt) -> tuple[Flat, list[bool]]:
    refuse_tied(tree)
    flat = flatten(tree)
    chosen = match(flat, wrt)
    if not any(c and is_array(leaf) for c, leaf in zip(chosen, flat.leaves, strict=True)):
        what = "a predicate" if callable(wrt) else repr(wrt)
        raise SelectionError(
            f"wrt selects no leaf: {what}. Nothing would be differentiated or trained. "
            f"The tree's paths: {_listed_paths(flat)}."
        )
    return flat, chosen


def _name(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _match_globs(flat: Flat, patterns: Sequence[str]) -> list[bool]:
    hits = {}
    for pattern in patterns:
        try:
            regex = _regex(pattern.removeprefix("!"))
        except re.error as e:
            raise SelectionError(f"wrt pattern {pattern!r} is no glob: {e}.") from e
        hits[pattern] = [regex.fullmatch(path) is not None for path in flat.paths]
        if not any(hits[pattern]):
            raise SelectionError(_no_match(pattern, flat))
    wanted = [hits[p] for p in patterns if not p.startswith("!")] or [[True] * len(flat.paths)]
    unwanted = [hits[p] for p in patterns if p.startswith("!")]
    return [
        any(w[i] for w in wanted) and not any(u[i] for u in unwanted)
        for i in range(len(flat.paths))
    ]


def _no_match(pattern: str, flat: Flat) -> str:
    bang, glob = ("!", pattern[1:]) if pattern.startswith("!") else ("", pattern)
    parts = (path.split("/") for path in flat.paths)
    inner = ["/".join(p[:depth]) for p in parts for depth in range(1, len(p))]
    close = [f"{glob}/**"] if glob in inner else []
    close += nearest(glob, [*flat.paths, *(f"{node}/**" for node in inner)])
    close = [repr(bang + c) for c in dict.fromkeys(close)]
    did_you_mean = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"wrt pattern {pattern!r} matches no leaf.{did_you_mean} "
        f"The tree's paths: {_listed_paths(flat)}."
    )


def _listed_paths(flat: Flat) -> str:
    return listed([repr(path) for path in flat.paths]) if flat.paths else "none, it has no leaf"


def _match_prefix(flat: Flat, mask: Flat) -> list[bool]:
    """Decides each leaf by the mask's entry at its path or at a node above it.

    By path and not by container: a mask of plain dicts then serves a module too.
    """
    answers = {p: m for p, m in zip(mask.paths, mask.leaves, strict=True) if not is_hole(m)}
    used, silent, chosen = set(), [], []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        found = next((node for node in above if node in answers), None)
        if found is None and is_array(leaf):
            silent.append(f"'{path}'")
        used.add(found)
        chosen.append(found is not None and _decision(answers[found], found))
    if unknown := [path for path in answers if path not in used]:
        close = nearest(unknown[0], flat.paths)
        raise SelectionError(
            f"wrt, a tree of booleans, decides {listed(map(repr, unknown))}, which the tree "
            f"has not.{f' Nearest: {listed(map(repr, close))}.' if close else ''}"
        )
    if silent:
        raise SelectionError(
            f"wrt is no glob, list of globs or predicate, and as a tree of booleans it says "
            f"nothing about {listed(silent)}. Give each leaf, or a node above it, True or False."
        )
    return chosen


def _decision(answer: Any, path: str) -> bool:
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    raise SelectionError(
        f"wrt answers {answer!r} for '{path}', and only True or False will do. Decide by path, "
        "shape and dtype, which are known under jit; the values of a leaf are not."
    )


def refuse_tied(tree: PyTree) -> None:
    """Raises where one NNX variable stands at two paths."""
    variable = nnx_types("Variable")
    if not variable:
        return
    seen: dict[int, str] = {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, variable))
    for path, node in nodes:
        if not isinstance(node, variable):
            continue
        name = _name(path)
        if (first := seen.setdefault(id(node), name)) != name:
            raise SelectionError(
                f"'{first}' and '{name}' are one tied {type(node).__name__}. Taken apart as a "
                "pytree, each copy would get a part of the gradient and they would drift apart. "
                "Use `apply, params = jaxgrad.functional(model)`, which keeps them one."
            )


@functools.lru_cache(maxsize=1024)
def _regex(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression; `a/**` takes `a` itself too, `**/a` takes a top-level `a`."""
    *parents, last = glob.split("/")
    head = "".join("(?:.*/)?" if part == "**" else _segment(part) + "/" for part in parents)
    if last != "**":
        return re.compile(head + _segment(last))
    if not head:
        return re.compile(".*")
    return re.compile(f"{head[:-1]}(?:/.*)?" if head.endswith("/") else f"{head}.*")


def _segment(part: str) -> str:
    tokens = re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", part)
    return "".join(_token(token) for token in tokens)


def _token(token: str) -> str:
    if token.startswith("*"):
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if len(token) > 2 and token[0] == "[":
        negated = token[1] == "!"
        members = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[1 + negated : -1])
        return f"(?!/)[{'^' * negated}{members}]"
    return re.escape(token)
