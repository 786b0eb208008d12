"""Where an equation comes from, and what its values are."""

import re
from typing import Any

from jax.extend import core as jex
from jax.extend import source_info_util

_CELL = re.compile(r"^.*[/\\]ipykernel_\d+[/\\]\d+\.py:")  # a file that is not there


def whence(eqn: jex.JaxprEqn) -> tuple[str, str]:
    """The source line and the scope (Flax module, named scope) of an equation."""
    source = _CELL.sub("notebook cell:", source_info_util.summarize(eqn.source_info))
    return source, str(eqn.source_info.name_stack)


def aval(atom: jex.Var | jex.Literal) -> Any:
    """The shape and dtype of a value; JAX's type for it promises neither."""
    return atom.aval


def shape(atom: jex.Var | jex.Literal) -> tuple[Any, ...]:
    """The shape of a value; a token, which orders side effects, has none."""
    return getattr(aval(atom), "shape", ())


def dtype(atom: jex.Var | jex.Literal) -> Any:
    """The dtype of a value, None for a token."""
    return getattr(aval(atom), "dtype", None)
