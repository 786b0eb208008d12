"""Which leaves a `wrt` means: globs, lists, predicates, boolean trees, against a tree."""

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxgrad._text import listed, nearest
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, is_hole, is_number, parameters
from jaxgrad._tree.pattern import matches, nodes_of
from jaxgrad._tree.selection import Selection, SelectionError

Wrt: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool] | Selection | PyTree
"""What to differentiate or train: glob, list of globs, predicate, tree of booleans, `Selection`."""


# What the rest of the package builds on.


def match(flat: Flat, wrt: Wrt) -> list[bool]:
    """Which positions of a flattened tree `wrt` takes; holes count, as they were leaves once."""
    if isinstance(wrt, Selection):
        chosen = _match_selection(flat, wrt)
    elif isinstance(wrt, str):
        chosen = _match_globs(flat, [wrt])
    elif isinstance(wrt, list | tuple) and wrt and all(isinstance(w, str) for w in wrt):
        chosen = _match_globs(flat, wrt)
    elif callable(wrt) and jax.tree_util.all_leaves([wrt]):  # not a module that is callable
        chosen = [
            is_parameter and _decision(wrt(path, leaf), path)
            for path, leaf, is_parameter in zip(
                flat.paths, flat.leaves, parameters(flat.leaves), strict=True
            )
        ]
    else:
        chosen = _match_prefix(flat, flatten(wrt))
    known = parameters(flat.leaves)
    return [
        c and (is_hole(leaf) or is_parameter or _is_named(path, leaf, wrt))
        for c, path, leaf, is_parameter in zip(chosen, flat.paths, flat.leaves, known, strict=True)
    ]


def _is_named(path: str, leaf: object, wrt: Wrt) -> bool:
    """Whether a Python number beside arrays is selected: by a pattern that is its own path."""
    patterns = [wrt] if isinstance(wrt, str) else wrt if isinstance(wrt, list | tuple) else []
    return is_number(leaf) and (path in patterns or isinstance(wrt, Selection))


def _match_globs(flat: Flat, patterns: Sequence[str]) -> list[bool]:
    hits = {}
    for pattern in patterns:
        try:
            hits[pattern] = matches(pattern.removeprefix("!"), flat.paths)
        except re.error as e:
            raise SelectionError(f"wrt pattern {pattern!r} is not a valid glob: {e}.") from e
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
    close = nearest(glob.removesuffix("/**"), [*flat.paths, *sorted(nodes_of(flat.paths))])
    close = [repr(bang + c) for c in dict.fromkeys(close)]
    did_you_mean = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"wrt pattern {pattern!r} matches no leaf.{did_you_mean} "
        f"The tree's paths: {listed_paths(flat)}."
    )


def listed_paths(flat: Flat) -> str:
    return listed([repr(path) for path in flat.paths]) if flat.paths else "none, it has no leaves"


def _match_selection(flat: Flat, selection: Selection) -> list[bool]:
    if flat.treedef == selection.flat.treedef:
        return list(selection.flags)
    known = dict(zip(selection.flat.paths, selection.flags, strict=True))
    arrays = [p for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)]
    if unknown := [repr(path) for path in arrays if path not in known]:
        raise SelectionError(
            f"the selection was made for another tree: it does not have {listed(unknown)}. "
            "Select from this tree: jaxgrad.select(tree, wrt)."
        )
    return [known.get(path, False) for path in flat.paths]


def _match_prefix(flat: Flat, mask: Flat) -> list[bool]:
    """Decides each leaf by the mask's entry at its path or at a node above it.

    By path and not by container: a mask of plain dicts then serves a module too.
    """
    answers = {p: m for p, m in zip(mask.paths, mask.leaves, strict=True) if not is_hole(m)}
    used, silent, chosen = set(), [], []
    for path, is_parameter in zip(flat.paths, parameters(flat.leaves), strict=True):
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
        found = next((node for node in above if node in answers), None)
        if found is None and is_parameter:
            silent.append(f"'{path}'")
        used.add(found)
        chosen.append(found is not None and _decision(answers[found], found))
    if unknown := [path for path in answers if path not in used]:
        close = nearest(unknown[0], flat.paths)
        raise SelectionError(
            f"wrt, a tree of booleans, has an entry for {listed(map(repr, unknown))}, which "
            f"the tree lacks.{f' Nearest: {listed(map(repr, close))}.' if close else ''}"
        )
    if silent:
        raise SelectionError(
            f"wrt is not a glob, a list of globs or a predicate, and as a tree of booleans it has "
            f"no entry for {listed(silent)}. Give each leaf, or a node above it, True or False."
        )
    return chosen


def _decision(answer: object, path: str) -> bool:
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    raise SelectionError(
        f"wrt gives {answer!r} for '{path}'; it must give True or False. Decide by path, "
        "shape and dtype, which are known under jit; the values of a leaf are not."
    )
