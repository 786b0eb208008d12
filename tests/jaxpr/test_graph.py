import jax
import jax.numpy as jnp
import pytest

import jaxgrad as jg


def loss(params, x):
    with jax.named_scope("trunk"):
        h = jax.checkpoint(lambda h: jnp.tanh(h @ params["w"]))(x)
    return jax.nn.relu(h).sum(), params["b"] * 2


PARAMS = {"b": jnp.ones(2), "w": jnp.ones((3, 4))}


@pytest.fixture
def graph():
    return jg.trace(loss, PARAMS, jnp.ones((5, 3)))


def test_calls_are_seen_through(graph):
    names = [e.primitive for e in graph.equations]
    assert names == ["dot_general", "tanh", "max", "reduce_sum", "mul"]


def test_equations_have_scope_line_and_cost(graph):
    product, tanh = graph.equations[:2]
    assert (product.scope, graph.equations[2].scope) == ("trunk", "")
    assert product.source.split(":")[0] == __file__
    line = loss.__code__.co_firstlineno + 2
    assert all(e.source.split(":")[1] == str(line) for e in (product, tanh))
    assert (product.flops, tanh.flops, graph.flops) == (2 * 5 * 3 * 4, 20, 120 + 20 + 20 + 20 + 2)


def test_a_line_of_a_notebook():
    cell = compile("def twice(x):\n    return 2 * x", "/tmp/ipykernel_71/2891.py", "exec")
    exec(cell, names := {})
    (product,) = jg.trace(names["twice"], jnp.ones(3)).equations
    assert product.source == "notebook cell:2:11 (twice)"


def test_equations_name_what_they_take(graph):
    assert graph.equations[0].inputs == ("x", "params/w")
    assert graph.equations[2].inputs == ("%1", "0.0")
    assert graph.equations[2].outputs == ("float32[5,4]",)
    assert str(graph.equations[1]).startswith("%1 = tanh(%0) -> float32[5,4]  # ")


def test_depends_on(graph):
    assert graph.depends_on() == ["params/b", "params/w", "x"]
    assert graph.depends_on(0) == ["params/w", "x"]
    assert graph.depends_on(1) == ["params/b"]


def test_influences(graph):
    assert [e.primitive for e in graph.influences("params/b")] == ["mul"]
    assert len(graph.influences(["params/w", "x"])) == 4
    with pytest.raises(jg.SelectionError, match=r"matches no leaf.*Did you mean 'params/w'"):
        graph.influences("param/w")


def test_arrays_that_are_closed_over_are_inputs():
    table = jnp.arange(3.0)
    graph = jg.trace(lambda x: x + table, jnp.ones(3))
    assert graph.inputs == ("closed over/0", "x")


def test_abstract_arguments():
    x = jax.ShapeDtypeStruct((1000, 1000), "float32")
    assert jg.trace(jnp.matmul, x, x).flops == 2 * 10**9
