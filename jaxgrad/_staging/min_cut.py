"""Where to cut a frozen computation: what to store once, what to compute again in every step.

Storing costs memory and, in every step, the time to read a row; computing again costs floating
point operations. Both are put in one unit: reading a byte takes about as long as ten operations
on today's CPUs and accelerators (the machine balance of the roofline model). The cheapest choice
is then a minimum cut, as PyTorch's AOTAutograd chooses what to save for the backward pass:

- an equation on the near side is computed once, on the far side in every step; an equation on
  the far side costs its operations;
- a value that is made on the near side and used on the far side is stored, and costs its bytes;
- what depends on the trained parameters is on the far side.

So a one-hot label is not stored where the label is, nor a float image where its bytes are.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from jax.extend import core as jex

from jaxgrad._jaxpr.flops import flops, nbytes

FLOPS_PER_BYTE = 10
BYTES_PER_READ = 10_000  # reading one more array takes some microseconds, however small it is


def minimum_cut(
    equations: Iterable[jex.JaxprEqn],
    given: Collection[jex.Var],
    forced: Callable[[jex.JaxprEqn], bool],
    outputs: Collection[jex.Var],
) -> list[jex.Var]:
    """Returns the values to store: the cheapest ones that cut the frozen part off.

    Args:
        equations: all equations of the program that are not constant, in order.
        given: the per-example inputs; they are there already, but reading them costs as well.
        forced: whether an equation must run in every step.
        outputs: what the program returns.
    """
    import networkx as nx  # only here: `import jaxgrad` stays fast

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
                graph.add_edge(v, node)  # without a capacity: can't be cut
    # Of networkx's algorithms the fastest on these long, thin graphs that has a good bound.
    _, (near, _) = nx.minimum_cut(graph, "once", "step", flow_func=nx.algorithms.flow.dinitz)
    return [v for v in uses if maker[v] != "step" and maker[v] in near and v not in near]


def _reading(var: jex.Var, given: bool) -> float:
    """What a step spends on reading a value; among equals, what is there already comes first."""
    return FLOPS_PER_BYTE * (nbytes(var) + BYTES_PER_READ) * (0.99 if given else 1)
