import jax.numpy as jnp
from flax import nnx

import jaxgrad as jg
from jaxgrad._drawing.owners import modules, units


class Inner(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = x + self.up(self.norm(x))
        return x * 2


class Outer(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Inner(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return jnp.sin(x)


def owners(depth):
    """Of each primitive, in order, the module."""
    apply, params = jg.functional(Outer())
    graph = jg.trace(lambda params, x: apply(params, x), params, jnp.ones((2, 4)))
    named = zip(graph.jaxpr.invars, graph.inputs, strict=True)
    paths = {v: n.removeprefix("params/") for v, n in named if n.startswith("params/")}
    found = modules(graph.jaxpr, paths, depth)
    return [(e.primitive, m) for e, m in zip(graph.equations, found, strict=True)]


def test_units():
    assert units("layers/0/up/kernel") == ("layers/0", "up")
    assert units("kernel") == () and units("0/kernel") == ("0",)


def test_a_blocks_first_and_last_lines_are_its_own():
    found = owners(1)
    assert found[-1] == ("sin", None)  # of the model's body
    assert [m for p, m in found if p == "mul" and m][-1] == "layers/1"
    first = next(i for i, (_, m) in enumerate(found) if m == "layers/1")
    # The statistics of the norm come before its parameters, and the doubling ends the block.
    assert found[first - 1] == ("mul", "layers/0") and found[first][0] in ("square", "reduce_sum")
    assert {m for _, m in found[:-1]} == {"layers/0", "layers/1"}


def test_deeper_modules_leave_the_blocks_own_lines_to_no_one():
    found = owners(2)
    assert {m for _, m in found} == {
        None,
        *(f"layers/{i}/{name}" for i in range(2) for name in ("norm", "up")),
    }
    assert [p for p, m in found if m is None] == ["add", "mul", "add", "mul", "sin"]
