"""Assigns each equation to a module of the model.

Linen and `jax.named_scope` write the module into the jaxpr. NNX, Equinox and plain functions do
not, but their parameters reveal it: an equation that reads `layers/0/kernel` belongs to `layers/0`.
The equations between two such *anchors* of one module belong to it too. Between anchors of two
modules, the Python call stack decides: an equation belongs to a module if both are in the same
`__call__`, else to neither.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax.extend import core as jex


class Frame(NamedTuple):
    """One call on the way to an equation."""

    file: str
    function: str
    line: int


_HIDDEN = (str(Path(jax.__file__).parent), str(Path(__file__).parents[1] / "_"))


def frames(eqn: jex.JaxprEqn) -> tuple[Frame, ...]:
    """The Python calls that lead to an equation, outermost first, without JAX's and jaxgrad's."""
    traceback = eqn.source_info.traceback
    found = (
        []
        if traceback is None
        else [Frame(f.file_name, f.function_name, f.line_num) for f in traceback.frames]
    )
    return tuple(f for f in reversed(found) if not f.file.startswith(_HIDDEN))


def units(path: str) -> tuple[str, ...]:
    """The modules that contain a parameter: `layers/0` and `up` for `layers/0/up/kernel`."""
    parts: list[str] = []
    for part in path.split("/")[:-1]:
        if part.isdigit() and parts:
            parts[-1] += f"/{part}"
        else:
            parts.append(part)
    return tuple(parts)


def modules(jaxpr: jex.Jaxpr, params: Mapping[jex.Var, str], depth: int | None) -> list[str | None]:
    """Returns the module of each equation, or None for those outside modules.

    Args:
        jaxpr: the equations, inlined.
        params: the paths of the parameters among its inputs.
        depth: the depth to which modules are told apart; None for any depth.
    """
    of_params = {v: units(path) for v, path in params.items()}
    scopes = [_scope(eqn) for eqn in jaxpr.eqns]
    outer = _shared([s for s in scopes if s])
    known = dict(of_params)
    anchors: list[Anchor | None] = []
    for eqn, scope in zip(jaxpr.eqns, scopes, strict=True):
        inputs = [v for v in eqn.invars if isinstance(v, jex.Var)]
        found = [known[v] for v in inputs if v in known]
        if found and len(found) == len(inputs):
            known.update(dict.fromkeys(eqn.outvars, found[0]))
        whole = scope[len(outer) :] or next(filter(None, found), ())
        named = whole[:depth]
        stack = () if scope else frames(eqn)
        call = _call(stack, len(whole) - len(named))
        anchors.append(Anchor("/".join(named), call, stack) if named else None)
    return _filled(anchors, [frames(eqn) for eqn in jaxpr.eqns])


class Anchor(NamedTuple):
    """An equation whose module is known.

    Attributes:
        module: the module.
        call: the call stack down to the module's own `__call__`, or () if it has none.
        stack: the complete call stack.
    """

    module: str
    call: tuple[Frame, ...]
    stack: tuple[Frame, ...]


def _call(stack: Sequence[Frame], below: int) -> tuple[Frame, ...]:
    """The stack down to the `__call__` this many modules above the innermost one."""
    calls = [i for i, f in enumerate(stack) if f.function.endswith("__call__")]
    return tuple(stack[: calls[-1 - below] + 1]) if len(calls) > below else ()


def _nearness(stack: Sequence[Frame], anchor: Anchor) -> int:
    """How many calls an equation shares with an anchor, or 0 outside the anchor's module."""
    n = len(anchor.call)
    if not n or len(stack) < n or tuple(stack[: n - 1]) != anchor.call[:-1]:
        return 0
    if stack[n - 1]._replace(line=0) != anchor.call[-1]._replace(line=0):
        return 0
    pairs = list(zip(stack, anchor.stack, strict=False))
    same = len(list(itertools.takewhile(lambda p: p[0] == p[1], pairs)))
    # Another line of the same function is nearer than another function.
    return 1 + 2 * same + any(a.function == b.function for a, b in pairs[same : same + 1])


def _scope(eqn: jex.JaxprEqn) -> tuple[str, ...]:
    """The Flax modules and named scopes of an equation, without transformations and einsums."""
    parts = str(eqn.source_info.name_stack).split("/")
    return tuple(p for p in parts if re.fullmatch(r"[\w-]+", p))


def _shared(scopes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The scopes that contain all of these; none if there is only one."""
    if len(set(scopes)) < 2:
        return ()
    columns = zip(*scopes, strict=False)
    return tuple(c[0] for c in itertools.takewhile(lambda c: len(set(c)) == 1, columns))


def _filled(
    anchors: Sequence[Anchor | None], stacks: Sequence[Sequence[Frame]]
) -> list[str | None]:
    filled = [a.module if a else None for a in anchors]
    known = [i for i, a in enumerate(anchors) if a]
    for i, j in zip([None, *known], [*known, None], strict=True):
        gap = range(0 if i is None else i + 1, len(anchors) if j is None else j)
        ends = [a for a in (None if k is None else anchors[k] for k in (i, j)) if a]
        if len(ends) == 2 and ends[0].module == ends[1].module:
            filled[gap.start : gap.stop] = [ends[0].module] * len(gap)
            continue
        for k in gap:
            # The last lines of a block and the first lines of the next are in calls that look
            # alike: the deeper call wins, and the earlier one if both are equally deep.
            best = max(ends, key=lambda a: _nearness(stacks[k], a), default=None)
            if best and _nearness(stacks[k], best):
                filled[k] = best.module
                ends = ends[ends.index(best) :]
    return filled
