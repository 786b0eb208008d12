"""Paths, and the patterns that match them: one language for both `wrt` and `torch.Rule`.

A pattern takes the paths that it matches and everything below them, so that the name of a layer
takes the layer. Gitignore and Flax's `nnx.PathContains` read a name the same way; a shell's glob,
which stops at the name, would leave `"head"` without a single leaf to train.
"""

import functools
import re
from collections.abc import Sequence

import jax


def leaf_name(path: Sequence[object]) -> str:
    """A JAX key path as a string: `head/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def nodes_of(paths: Sequence[str]) -> set[str]:
    """The paths of the inner nodes above the leaves at `paths`, the root excluded."""
    return {
        path[:end] for path in paths for end in (m.start() for m in re.finditer("/", path)) if end
    }


def is_within(path: str, node: str) -> bool:
    """Whether a path is that of a node or of something below it."""
    return path == node or path.startswith(f"{node}/")


def matches(glob: str, paths: Sequence[str]) -> list[bool]:
    """Which paths a pattern takes: itself if it is one of them literally, else those of the glob.

    Raises:
        re.error: the pattern holds a malformed character set (`[z-a]`).
    """
    if glob in paths or glob in nodes_of(paths):
        return [is_within(path, glob) for path in paths]
    regex = compiled(glob)
    return [regex.fullmatch(path) is not None for path in paths]


@functools.lru_cache(maxsize=1024)
def compiled(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression.

    It has a group for each run of stars, in order, and a last one for the path below the matched
    node. `**/` also matches no level (`**/a` matches `a`), as does `/**` (`a/**` matches `a`).
    """
    tokens = re.findall(r"(?:(?<=/)|^)\*\*/|/\*\*(?=/|$)|\*+|\?|\[[!]?\]?[^\]]*\]|.", glob)
    if glob == "**":
        return re.compile("(.*)()")
    return re.compile("".join(map(_token, tokens)) + "(/.*)?")


def _token(token: str) -> str:
    if token == "**/":
        return "((?:.*/)?)"
    if token == "/**":
        return "((?:/.*)?)"
    if token.startswith("*"):
        return "([^/]*)"
    if token == "?":
        return "[^/]"
    if len(token) > 2 and token[0] == "[":
        negated = token[1] == "!"
        members = re.sub(r"([\\\[\]^&~|])", r"\\\1", token[1 + negated : -1])
        return f"(?!/)[{'^' * negated}{members}]"
    return re.escape(token)
