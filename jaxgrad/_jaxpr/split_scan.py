"""Cuts a scan over stacked layers in two, where the first layers are frozen.

If the layers' parameters are stacked along axis 0 and only the last ones are trained, the scan runs
over `concatenate([frozen, trained])`. As one equation it would be differentiated over all layers;
as two, the first scan has frozen inputs only and can be staged.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.extend import core as jex
from jax.extend.core import primitives

from jaxgrad._jaxpr.source import Atom, dtype, shape
from jaxgrad._jaxpr.views import Scan


class Parts(NamedTuple):
    """The two scans as a program over the equation's inputs and the `extra` values."""

    program: jex.ClosedJaxpr
    extra: list[Atom]


def split_scan(
    eqn: jex.JaxprEqn, scan: Scan, before: Sequence[jex.JaxprEqn], varying: set[jex.Var]
) -> Parts | None:
    """Cuts a scan where its stacked inputs change from frozen to trainable.

    Args:
        eqn: the scan.
        scan: its parts.
        before: the equations that come before it.
        varying: the values that depend on the trained parameters.

    Returns:
        The two scans, or None if there is no such place.
    """
    if scan.reverse:
        return None
    fixed = scan.fixed
    if any(v in varying for v in eqn.invars[:fixed] if isinstance(v, jex.Var)):
        return None
    maker = {v: e for e in before for v in e.outvars}
    stacks: dict[int, tuple[Atom, Atom]] = {}
    for i, v in enumerate(eqn.invars[fixed:], fixed):
        if isinstance(v, jex.Var) and v in varying:
            halves = _frozen_then_trained(maker.get(v), varying)
            if halves is None:
                return None
            stacks[i] = halves
    where = {shape(first)[0] for first, _ in stacks.values()}
    if len(where) != 1:
        return None
    (k,) = where
    order = list(stacks)

    def two_scans(*values: jax.Array) -> list[jax.Array]:
        args, extra = values[: len(eqn.invars)], values[len(eqn.invars) :]
        firsts = dict(zip(order, extra[: len(order)], strict=True))
        rests = dict(zip(order, extra[len(order) :], strict=True))
        consts, carry, stacked = scan.parts(args)
        ys = []
        for part, start, stop in ((firsts, 0, k), (rests, k, scan.length)):
            xs = [
                part[i] if i in part else lax.slice_in_dim(x, start, stop)
                for i, x in enumerate(stacked, fixed)
            ]
            outs = scan.bind(eqn, [*consts, *carry, *xs], stop - start)
            carry, y = outs[: scan.carries], outs[scan.carries :]
            ys.append(y)
        return [*carry, *(lax.concatenate(both, 0) for both in zip(*ys, strict=True))]

    extra = [first for first, _ in stacks.values()] + [rest for _, rest in stacks.values()]
    avals = [jax.ShapeDtypeStruct(shape(v), dtype(v)) for v in [*eqn.invars, *extra]]
    return Parts(jax.make_jaxpr(two_scans)(*avals), extra)


def _frozen_then_trained(
    eqn: jex.JaxprEqn | None, varying: set[jex.Var]
) -> tuple[Atom, Atom] | None:
    if eqn is None or eqn.primitive is not primitives.concatenate_p:
        return None
    if eqn.params["dimension"] != 0 or len(eqn.invars) != 2:
        return None
    first, rest = eqn.invars
    return None if isinstance(first, jex.Var) and first in varying else (first, rest)
