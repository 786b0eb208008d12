import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrad as jg


def line_of(fun, offset):
    return f"{fun.__code__.co_filename}:{fun.__code__.co_firstlineno + offset}"


def test_finite_is_none():
    assert jg.find_nonfinite(lambda p, x: jnp.sum(p * x), jnp.ones(2), jnp.ones(2)) is None


def test_the_log_of_zero_in_the_forward_pass():
    def loss(params, batch):
        h = batch["x"] @ params["w"]
        with jax.named_scope("entropy"):
            y = jnp.log(h)
        return jnp.sum(y * 2)

    params = {"w": jnp.eye(2)}
    found = jg.find_nonfinite(loss, params, {"x": jnp.array([[1.0, 2.0], [3.0, 0.0]])})
    op = found.operation
    assert (found.phase, op.primitive, op.scope, op.iterations) == ("forward", "log", "entropy", ())
    assert op.source.startswith(line_of(loss, 3))
    assert op.after == ("params/w",)
    assert repr(found).splitlines() == [
        f"forward: log at {op.source} in entropy gives "
        "float32[2,2], 1 of 4 -inf, the first at [1, 1]",
        "  from float32[2,2] from 0 to 3",
        "  after params/w",
    ]


def test_the_square_root_at_zero_in_the_backward_pass():
    def loss(params):
        with jax.named_scope("norm"):
            return jnp.sqrt(jnp.sum(params["w"] ** 2))

    found = jg.find_nonfinite(loss, {"w": jnp.zeros(3)})
    assert (found.phase, found.operation.scope) == ("backward", "norm")
    assert found.operation.source.startswith(line_of(loss, 2))
    assert found.became_nan.primitive == "mul"  # inf * 0
    assert repr(found).splitlines()[-1] == f"  which becomes NaN in {found.became_nan}"


def test_only_the_selected_are_differentiated():
    loss = lambda p: jnp.sqrt(p["a"]) + p["b"]
    params = {"a": jnp.array(0.0), "b": jnp.array(1.0)}
    assert jg.find_nonfinite(loss, params, wrt="a").phase == "backward"
    assert jg.find_nonfinite(loss, params, wrt="b") is None


def test_a_parameter_that_is_infinite():
    params = {"head": {"w": jnp.array([1.0, jnp.inf])}, "trunk": jnp.ones(2)}
    found = jg.find_nonfinite(lambda p, x: jnp.sum(p["head"]["w"] * x), params, jnp.ones(2))
    assert (found.phase, found.path, found.operation) == ("input", "p/head/w", None)
    assert repr(found) == "input: p/head/w is float32[2], 1 of 2 inf, the first at [1]"


def test_a_batch_with_a_nan():
    batch = {"image": jnp.ones((2, 3)).at[1, 2].set(jnp.nan), "label": jnp.arange(2)}
    found = jg.find_nonfinite(lambda p, batch: jnp.sum(p * batch["image"]), 1.0, batch)
    assert repr(found) == "input: batch/image is float32[2,3], 1 of 6 nan, the first at [1, 2]"


def test_a_value_that_is_closed_over():
    table = jnp.array([1.0, jnp.nan])
    found = jg.find_nonfinite(lambda p: jnp.sum(p * table), 1.0)
    assert repr(found) == "input: closed over/0 is float32[2], 1 of 2 nan, the first at [1]"


def test_infinities_that_do_no_harm_are_not_blamed():
    def loss(p, x):
        masked = jnp.where(jnp.arange(3) < 2, p * x, -jnp.inf)
        weights = jax.nn.softmax(masked)
        return jnp.sum(jnp.log(weights[:2] - jnp.array([0.5, 0.0])))

    assert jg.find_nonfinite(loss, jnp.array([1.0, 0.0, 0.0]), jnp.ones(3)) is None
    found = jg.find_nonfinite(loss, jnp.zeros(3), jnp.ones(3))
    assert (found.operation.primitive, found.value) == (
        "log",
        "float32[2], 1 of 2 -inf, the first at [0]",
    )


def test_an_infinity_that_turns_nan():
    def loss(p):
        e = jnp.exp(p * 1000)
        return jnp.sum(e / jnp.sum(e))

    found = jg.find_nonfinite(loss, jnp.ones(2))
    assert (found.operation.primitive, found.became_nan.primitive) == ("exp", "div")


@pytest.mark.parametrize("reverse", [False, True])
def test_the_turn_of_a_scan(reverse):
    def loss(params, x):
        def turn(carry, row):
            with jax.named_scope("cell"):
                return carry + jnp.log(row * params["w"]), carry

        with jax.named_scope("rnn"):
            return jnp.sum(jax.lax.scan(turn, jnp.zeros(2), x, reverse=reverse)[0])

    x = jnp.ones((5, 2)).at[3, 1].set(0.0)
    op = jg.find_nonfinite(loss, {"w": jnp.ones(2)}, x).operation
    assert (op.primitive, op.scope, op.iterations) == ("log", "rnn/cell", (3,))
    assert op.after == ("params/w",)
    assert str(op) == f"log at {op.source} in rnn/cell, iteration 3"


def test_the_turns_of_loops_within_loops():
    def loss(p, x):
        def outer(c, block):
            def inner(c, row):
                return c / row, None

            return jax.lax.scan(jax.jit(inner), c, block)[0] * p, None

        return jax.lax.scan(jax.checkpoint(outer), 1.0, x)[0]

    x = jnp.ones((3, 4)).at[1, 2].set(0.0)
    op = jg.find_nonfinite(loss, 1.0, x).operation
    assert (op.primitive, op.iterations) == ("div", (1, 2))


def test_a_scan_in_the_backward_pass():
    def loss(p, x):
        return jax.lax.scan(lambda c, row: (c + jnp.sqrt(row * p), None), 0.0, x)[0]

    found = jg.find_nonfinite(loss, 1.0, jnp.array([1.0, 4.0, 0.0, 9.0]))
    assert (found.phase, found.operation.iterations) == ("backward", (2,))


def test_while_and_cond():
    def in_while(p, x):
        halved = jax.lax.while_loop(lambda x: x > -2, lambda x: jnp.log(x - 1) - 1, x)
        return p * jax.lax.stop_gradient(halved)

    op = jg.find_nonfinite(in_while, 1.0, jnp.array(2.0)).operation
    assert (op.primitive, op.iterations) == ("log", (1,))

    def in_cond(p, x):
        return jax.lax.cond(x > 0, lambda x: x / p, lambda x: jnp.log(x) * p, x)

    op = jg.find_nonfinite(in_cond, 1.0, jnp.array(-1.0)).operation
    assert (op.primitive, op.iterations) == ("log", ())


def test_the_layer_of_a_linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3, name="trunk")(x)
            return nn.Dense(2, name="head")(x / 0)

    model = Net()
    x = jnp.ones((1, 2))
    params = model.init(jax.random.key(0), x)["params"]
    found = jg.find_nonfinite(lambda p, x: model.apply({"params": p}, x).sum(), params, x)
    assert (found.operation.primitive, found.operation.scope) == ("div", "Net")
    fine = lambda p, x: nn.Dense(2, name="head").apply({"params": p["head"]}, x).sum()
    infinite = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.full(2, -jnp.inf)}}
    assert jg.find_nonfinite(fine, infinite, jnp.ones((1, 3))).path == "p/head/bias"
    overflow = {"head": {"kernel": jnp.full((3, 2), 2e38), "bias": jnp.zeros(2)}}
    op = jg.find_nonfinite(fine, overflow, jnp.ones((1, 3))).operation
    assert (op.primitive, op.scope) == ("dot_general", "head")


def test_the_layer_of_an_nnx_model():
    class Net(nnx.Module):
        def __init__(self):
            self.trunk = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return jnp.log(self.head(nnx.relu(self.trunk(x) * 0)))

    apply, pure = jg.functional(Net())
    for loss, params in (
        (lambda params, x: params(x).sum(), Net()),
        (lambda params, x: apply(params, x).sum(), pure),
    ):
        found = jg.find_nonfinite(loss, params, jnp.ones((1, 2)))
        assert found.operation.primitive == "log"
        assert found.operation.after == ("params/head/bias",)
        assert found.operation.source.startswith(__file__)


def test_arguments_that_are_no_arrays_and_keywords():
    def loss(p, x, *, power, train=False):
        assert train is True
        return jnp.sum((x / p) ** power)

    found = jg.find_nonfinite(loss, jnp.array(0.0), jnp.ones(2), power=2, train=True)
    assert found.operation.primitive == "div"


def test_debug_nans_stays_out_of_the_way():
    with jax.debug_nans(True):
        assert jg.find_nonfinite(lambda p: jnp.log(p - 1), 0.0).operation.primitive == "log"
