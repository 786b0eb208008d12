"""Traces a loss to a flat jaxpr with sorted inputs: frozen, trainable, batch, varying.

The loss is traced anew for each batch size. A symbolic jaxpr would save these milliseconds, but any
function can be traced at a concrete size, and the trace is exactly what the function does there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jaxgrad._jaxpr.dataflow import depending
from jaxgrad._jaxpr.inline import inline
from jaxgrad._staging.two_traces import Misaligned, align, equal
from jaxgrad._tree.flat import Flat, PyTree, is_array, is_hole


@dataclasses.dataclass(frozen=True)
class Program:
    """A flat jaxpr and the roles of its inputs.

    Attributes:
        jaxpr: has no constants: arrays that the loss closes over are inputs.
        closed_over: the arrays that the loss closes over.
        frozen: the inputs for `closed_over` and the frozen parameters.
        trainable: the inputs for the selected parameters.
        batch: the inputs for the batch.
        vary: the inputs that change from step to step.
    """

    jaxpr: jex.Jaxpr
    closed_over: Sequence[Any]
    frozen: Sequence[jex.Var]
    trainable: Sequence[jex.Var]
    batch: Sequence[jex.Var]
    vary: Sequence[jex.Var]
    out_tree: Any

    def depending(self, inputs: Sequence[jex.Var]) -> set[jex.Var]:
        """The values that depend on any of these inputs, and the inputs themselves."""
        return depending(self.jaxpr.eqns, inputs)


class TracedLoss:
    """A loss with the shapes of its arguments; traces it at any batch size."""

    def __init__(
        self,
        fun: Callable[..., PyTree],
        params: Flat,
        chosen: Sequence[bool],
        batch: PyTree,
        vary: Sequence[PyTree],
    ) -> None:
        self.fun, self.params = fun, params
        self.trained = [i for i, c in enumerate(chosen) if c and is_array(params.leaves[i])]
        self.frozen = [
            i
            for i, leaf in enumerate(params.leaves)
            if is_array(leaf) and not is_hole(leaf) and i not in set(self.trained)
        ]
        self.batch, self.batch_tree = jax.tree.flatten(jax.eval_shape(lambda x: x, batch))
        self.vary, self.vary_tree = jax.tree.flatten(jax.eval_shape(lambda x: x, tuple(vary)))
        self.shapes = dict(
            zip(
                self.trained + self.frozen,
                jax.eval_shape(lambda x: x, [params.leaves[i] for i in self.trained + self.frozen]),
                strict=True,
            )
        )

    def trace(self, rows: int) -> Program:
        """Traces the loss at a batch size."""

        def fun(trainable, frozen, batch, vary):
            leaves = list(self.params.leaves)
            for i, leaf in zip(self.trained + self.frozen, [*trainable, *frozen], strict=True):
                leaves[i] = leaf
            params = self.params.treedef.unflatten(leaves)
            return self.fun(params, self.batch_tree.unflatten(batch), *vary)

        batch = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in self.batch]
        trainable = [self.shapes[i] for i in self.trained]
        frozen = [self.shapes[i] for i in self.frozen]
        vary = self.vary_tree.unflatten(self.vary)
        closed, out = jax.make_jaxpr(fun, return_shape=True)(trainable, frozen, batch, vary)
        counts = [len(trainable), len(frozen), len(batch), len(self.vary)]
        moves = [True, False, False, True]
        flat = inline(closed, [m for m, c in zip(moves, counts, strict=True) for _ in range(c)])
        invars = iter(flat.invars)
        groups = [[next(invars) for _ in range(c)] for c in counts]
        return Program(
            flat.jaxpr,
            flat.consts,
            frozen=[*flat.captured, *groups[1]],
            trainable=groups[0],
            batch=groups[2],
            vary=groups[3],
            out_tree=jax.tree.structure(out),
        )


def check_closed_over(first: Program, other: Program) -> None:
    """Compares the arrays that two traces of one loss close over.

    Raises:
        Misaligned: the arrays differ.
    """
    ours, theirs = first.closed_over, other.closed_over
    if len(ours) != len(theirs) or not all(map(equal, ours, theirs)):
        raise Misaligned("it closes over another array")


def pair(first: Program, other: Program) -> dict[jex.Var, jex.Var]:
    """Maps the values of one trace to those of another trace of the same loss.

    Raises:
        Misaligned: the computations differ.
    """
    pairs = align(first.jaxpr, other.jaxpr)
    check_closed_over(first, other)
    if first.out_tree != other.out_tree:
        raise Misaligned("it returns another structure")
    return pairs
