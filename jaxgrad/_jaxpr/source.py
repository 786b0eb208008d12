"""The source of an equation, and the shapes and dtypes of its values."""

import re
import sysconfig
from pathlib import Path
from typing import Any, TypeAlias

from jax.extend import core as jex
from jax.extend import source_info_util

Atom: TypeAlias = jex.Var | jex.Literal

_PACKAGE = str(Path(__file__).parents[1])
_CELL = re.compile(r"^.*[/\\]ipykernel_\d+[/\\]\d+\.py:")  # a file that does not exist


def whence(eqn: jex.JaxprEqn) -> tuple[str, str]:
    """The source line of an equation, and its scope (a Flax module or a named scope)."""
    source = _CELL.sub("notebook cell:", source_info_util.summarize(eqn.source_info))
    return source, str(eqn.source_info.name_stack)


def called_at(eqn: jex.JaxprEqn) -> str:
    """`, called at line`: the user's line of an equation that an installed package has written."""
    frames = getattr(eqn.source_info.traceback, "frames", ())
    packages = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    if not frames or not whence(eqn)[0].startswith(packages):
        return ""
    other = (*packages, sysconfig.get_path("stdlib"), _PACKAGE)
    for frame in frames:
        if not frame.file_name.startswith((*other, "<")):
            line = f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
            return f", called at {_CELL.sub('notebook cell:', line)}"
    return ""


def aval(atom: Atom) -> Any:
    """The abstract value; `Any`, since JAX's type for it has neither a shape nor a dtype."""
    return atom.aval


def shape(atom: Atom) -> tuple[Any, ...]:
    """The shape of a value; a token, which orders side effects, has none."""
    return getattr(aval(atom), "shape", ())


def dtype(atom: Atom) -> Any:
    """The dtype of a value, None for a token."""
    return getattr(aval(atom), "dtype", None)
