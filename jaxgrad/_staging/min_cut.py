"""Cuts a frozen computation: chooses what to store once and what to recompute in every step.

Storing costs memory and, in every step, the time to read a row; recomputing costs floating point
operations. Both are measured in one unit: reading a byte takes about as long as ten operations
on today's CPUs and accelerators (the machine balance of the roofline model). The cheapest choice
is then a minimum cut, as PyTorch's AOTAutograd chooses what to save for the backward pass:

- an equation on the near side is computed once, one on the far side in every step, which costs its
  operations;
- a value that is made on the near side and used on the far side is stored, which costs its bytes;
- everything that depends on the trained parameters is on the far side.

So the cut stores a label rather than its one-hot vector, and an image's bytes rather than floats.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from jax.extend import core as jex

from jaxgrad._jaxpr.flops import flops, nbytes

FLOPS_PER_BYTE = 10
BYTES_PER_READ = 10_000  # reading another array takes microseconds, however small it is


def minimum_cut(
    equations: Iterable[jex.JaxprEqn],
    given: Collection[jex.Var],
    forced: Callable[[jex.JaxprEqn], bool],
    outputs: Collection[jex.Var],
) -> list[jex.Var]:
    """Returns the values to store: the cheapest set that cuts off the frozen part.

    Args:
        equations: the equations of the program that are not constant, in order.
        given: the per-example inputs, which need no storage but cost reading, too.
        forced: whether an equation must run in every step.
        outputs: what the program returns.
    """
    import networkx as nx  # here, so that `import jaxgrad` stays fast

    graph = nx.DiGraph()
    graph.add_node("once")
    graph.add_node("step")
    maker: dict[jex.Var, Any] = dict.fromkeys(given, "once")
    uses: dict[jex.Var, set[Any]] = {}
    for i, eqn in enumerate(equations):
        node = "step" if forced(eqn) else i
        if node == i:
            graph.add_edge("once", i, capacity=flops(eqn))
        for v in eqn.invars:
            if isinstance(v, jex.Var) and v in maker:
                uses.setdefault(v, set()).add(node)
        maker.update(dict.fromkeys(eqn.outvars, node))
    for v in outputs:
        if v in maker:
            uses.setdefault(v, set()).add("step")
    for v, users in uses.items():
        if maker[v] != "step":
            graph.add_edge(maker[v], v, capacity=_reading(v, v in given))
            for node in users:
                graph.add_edge(v, node)  # an edge without a capacity can't be cut
    # The fastest of networkx's algorithms with a good bound on these long, thin graphs.
    _, (near, _) = nx.minimum_cut(graph, "once", "step", flow_func=nx.algorithms.flow.dinitz)
    return [v for v in uses if maker[v] != "step" and maker[v] in near and v not in near]


def _reading(var: jex.Var, given: bool) -> float:
    """The cost of reading a value in a step; a tie goes to a value that needs no storage."""
    return FLOPS_PER_BYTE * (nbytes(var) + BYTES_PER_READ) * (0.99 if given else 1)
