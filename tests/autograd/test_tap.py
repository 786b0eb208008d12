import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxgrad as jg
from jaxgrad._jaxpr.views import Checkpoint, view

PARAMS = {"head": jnp.arange(1.0, 4.0)[:, None], "trunk": jnp.arange(6.0).reshape(2, 3) / 7}
X = jnp.linspace(-1, 1, 8).reshape(4, 2)


def net(p, x, moved=None, named=True):
    h = jnp.tanh(x @ p["trunk"])
    h = jg.tap(h, "hidden") if named else h
    h = h if moved is None else h + moved
    return jnp.sum(jnp.sin(h) @ p["head"])


def expected(x=X):
    return jax.grad(lambda moved: net(PARAMS, x, moved))(jnp.zeros((len(x), 3)))


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), a, b)


def message(fun, *args):
    with pytest.raises(jg.TapError) as info:
        fun(*args)
    return str(info.value)


def hlo(fun, *args):
    text = jax.jit(fun).lower(*args).compile().as_text()
    return re.sub(r", metadata=\{[^}]*\}|FileNames.*?(?=\n\n%|\nENTRY|\Z)", "", text, flags=re.S)


def test_the_gradient_of_an_intermediate():
    value, (grads, taps) = jg.value_and_grad(net, taps=True)(PARAMS, X)
    same(taps, {"hidden": expected()})
    plain, plain_grads = jg.value_and_grad(net)(PARAMS, X)
    np.testing.assert_array_equal(value, plain)
    same(grads, plain_grads)


def test_what_comes_back_in_every_combination():
    def with_aux(p, x):
        return net(p, x), x.sum()

    (_, aux), (_, taps) = jg.value_and_grad(with_aux, has_aux=True, taps=True)(PARAMS, X)
    same((aux, taps["hidden"]), (X.sum(), expected()))
    (grads, taps), aux = jg.grad(with_aux, wrt="head", has_aux=True, taps=True)(PARAMS, X)
    same((aux, taps["hidden"]), (X.sum(), expected()))
    assert grads["trunk"] is None
    grads, taps = jg.grad(net, wrt="head", taps=True)(PARAMS, X)
    same(taps["hidden"], expected())


def test_a_tap_costs_nothing_where_it_is_not_asked_for():
    def loss(p, x, named):
        return jax.vmap(lambda row: net(p, row[None], named=named), 1)(x.T).sum()

    def step(named):
        return jax.value_and_grad(lambda p, x: loss(p, x, named) + net(p, x, named=named))

    assert hlo(step(True), PARAMS, X) == hlo(step(False), PARAMS, X)


@pytest.mark.parametrize("inner", [jax.jit, jax.checkpoint, lambda f: jax.checkpoint(jax.jit(f))])
def test_calls_are_looked_into(inner):
    loss = jax.jit(lambda p, x: inner(net)(p, x))
    same(jax.jit(jg.grad(loss, taps=True))(PARAMS, X)[1]["hidden"], expected())


def test_a_checkpoint_stays_one():
    def loss(p, x):
        return jax.checkpoint(net, policy=policy)(p, x)

    policy = jax.checkpoint_policies.dots_saveable
    jaxpr = jax.make_jaxpr(jg.grad(loss, taps=True))(PARAMS, X).jaxpr
    (checkpoint,) = (v for v in map(view, jaxpr.eqns) if isinstance(v, Checkpoint))
    assert checkpoint.policy == policy


def test_vmap_and_scan_stack():
    def mapped(p, x):
        return jax.vmap(lambda row: net(p, row[None]))(x).sum()

    def scanned(p, x):
        return jax.lax.scan(lambda c, row: (c + net(p, row[None]), None), 0.0, x)[0]

    def backwards(p, x):
        turn = lambda c, row: (c + net(p, row[None]), None)
        return jax.lax.scan(turn, 0.0, x, reverse=True, unroll=2)[0]

    for loss in (mapped, scanned, backwards):
        same(jax.jit(jg.grad(loss, taps=True))(PARAMS, X)[1]["hidden"], expected()[:, None])


def test_loops_within_loops_stack_the_outermost_first():
    x = jnp.arange(30.0).reshape(3, 5, 2) / 30

    def one(p, row):
        return net(p, row[None])

    def loss(p, x):
        def turn(c, block):  # scan over 3, vmap over 5
            return c + jax.vmap(one, (None, 1))(p, block.T).sum(), None

        return jax.lax.scan(turn, 0.0, x)[0]

    taps = jg.grad(loss, taps=True)(PARAMS, x)[1]["hidden"]
    assert taps.shape == (3, 5, 1, 3)
    same(taps.reshape(15, 3), expected(x.reshape(15, 2)))
    twice = lambda p, x: jax.vmap(jax.vmap(one, (None, 0)), (None, 1))(p, x).sum()
    taps = jg.grad(twice, taps=True)(PARAMS, x)[1]["hidden"]
    same(taps.reshape(15, 3), expected(x.transpose(1, 0, 2).reshape(15, 2)))


def test_what_vmap_shares_has_one_cotangent():
    def loss(p, x):
        return jax.vmap(lambda row: jnp.sum(row * jg.tap(p["w"] ** 2, "w2")))(x).sum()

    assert jg.grad(loss, taps=True)({"w": jnp.ones(2)}, X)[1]["w2"].tolist() == X.sum(0).tolist()


def test_under_vmap_and_scan():
    rows = X[:, None]
    f = jg.grad(net, taps=True)
    same(jax.vmap(f, (None, 0))(PARAMS, rows)[1]["hidden"], expected()[:, None])
    same(jax.lax.map(lambda row: f(PARAMS, row), rows)[1]["hidden"], expected()[:, None])


def test_a_cond_has_a_tap_in_each_branch():
    def loss(p, x, up):
        def one(x):
            return jnp.sum(jg.tap(x @ p["trunk"], "both"))

        def other(x):
            return jnp.sum(jg.tap(jg.tap(2 * x, "mine") @ p["trunk"], "both") ** 2)

        return jax.lax.cond(up, one, other, x)

    taps = jax.jit(jg.grad(loss, taps=True))(PARAMS, X, True)[1]
    same(taps, {"both": jnp.ones((4, 3)), "mine": jnp.zeros((4, 2))})
    taps = jax.jit(jg.grad(loss, taps=True))(PARAMS, X, False)[1]
    both = 2 * (2 * X @ PARAMS["trunk"])
    same(taps, {"both": both, "mine": both @ PARAMS["trunk"].T})


def test_trees_have_holes_for_what_is_no_float():
    def loss(p, x):
        h = jg.tap({"h": x @ p["trunk"], "n": jnp.arange(3), "deep": [x[0] * 2]}, "state")
        return jnp.sum(h["h"] * h["n"].astype("float32")[None]) + h["deep"][0].sum()

    state = jg.grad(loss, taps=True)(PARAMS, X)[1]["state"]
    same(state, {"h": jnp.tile(jnp.arange(3.0), (4, 1)), "n": None, "deep": [jnp.ones(2)]})


def test_dtypes_and_signed_zeros_stay():
    def loss(p):
        return jnp.sum(1 / jg.tap(p, "p").astype("float32"))

    value, (_, taps) = jg.value_and_grad(loss, taps=True)(jnp.full(2, -0.0, "bfloat16"))
    assert value == -jnp.inf
    assert taps["p"].dtype == jnp.bfloat16


def test_higher_order():
    def penalty(p, x):
        grads, taps = jg.grad(net, taps=True)(p, x)
        return jnp.sum(taps["hidden"] ** 2) + jnp.sum(grads["head"])

    def by_hand(p, x):
        f = jax.grad(lambda p, m: net(p, x, m, named=False), (0, 1))
        grads, hidden = f(p, jnp.zeros((4, 3)))
        return jnp.sum(hidden**2) + jnp.sum(grads["head"])

    same(jax.grad(penalty)(PARAMS, X), jax.grad(by_hand)(PARAMS, X))


def test_the_innermost_call_takes_the_taps():
    def outer(p, x):
        _, taps = jg.grad(net, taps=True)(p, x)
        return jnp.sum(jg.tap(taps["hidden"], "outer"))

    taps = jg.grad(outer, taps=True)(PARAMS, X)[1]
    same(taps, {"outer": jnp.ones((4, 3))})


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable, "no checkpoint"])
def test_an_inner_gradient_that_takes_none_leaves_them_to_the_outer(policy):
    inner = net if policy == "no checkpoint" else jax.checkpoint(net, policy=policy)

    def outer(p, x):
        return jnp.sum(jax.grad(inner)(p, x)["head"] * p["head"])

    def moved(move):
        return jnp.sum(jax.grad(lambda p: net(p, X, move))(PARAMS)["head"] * PARAMS["head"])

    taps = jg.grad(outer, taps=True)(PARAMS, X)[1]
    same(taps["hidden"], jax.grad(moved)(jnp.zeros((4, 3))))


def test_microbatches_stack_and_have_the_whole_batchs_gradient():
    loss = lambda p, x: net(p, x) / len(x)
    taps = jg.grad(loss, taps=True, microbatches=2)(PARAMS, X)[1]["hidden"]
    assert taps.shape == (2, 2, 3)
    same(taps.reshape(4, 3), jg.grad(loss, taps=True)(PARAMS, X)[1]["hidden"])


def test_flax_modules():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jg.tap(nn.relu(nn.Dense(3)(x)), "relu")
            return nn.Dense(1)(h)

    class Nnx(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(3, 1, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.last(jg.tap(nnx.relu(self.first(x)), "relu"))

    model = Linen()
    params = model.init(jax.random.key(0), X)["params"]
    taps = jg.grad(lambda p, x: model.apply({"params": p}, x).sum(), taps=True)(params, X)[1]
    same(taps["relu"], jnp.tile(params["Dense_1"]["kernel"].T, (4, 1)))
    taps = jg.grad(lambda m, x: m(x).sum(), taps=True)(Nnx(), X)[1]
    same(taps["relu"], jnp.tile(Nnx().last.kernel[...].T, (4, 1)))


def test_in_shard_map_each_device_has_its_own():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda p, x: jg.grad(net, taps=True)(p, x)[1]["hidden"],
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    same(f(PARAMS, X), expected())


def test_a_staged_loss_keeps_its_taps():
    def loss(p, batch):
        h = jg.tap(jnp.tanh(batch @ p["trunk"]), "frozen")
        return jnp.mean(jg.tap(h @ p["head"], "logits") ** 2)

    params = {"head": PARAMS["head"], "trunk": jnp.ones((200, 3)) / 100}
    x = jnp.linspace(-1, 1, 800).reshape(4, 200)
    staged = jg.stage(loss, params, x, wrt="head")
    assert staged.report().staged
    head = jg.partition(params, "head")[0]
    taps = jg.grad(staged.loss, taps=True)(head, staged.prepare(x)[:4])[1]
    same(taps, {"logits": jg.grad(loss, taps=True)(params, x)[1]["logits"]})


def test_a_name_that_occurs_twice():
    def loss(p, x):
        for _ in range(2):
            x = jg.tap(x * p, "x")
        return x.sum()

    line = loss.__code__.co_firstlineno + 2
    text = message(jg.grad(loss, taps=True), 2.0, X)
    assert re.fullmatch(
        rf"tap 'x' occurs twice: at .*test_tap.py:{line}.*, and at .*test_tap.py:{line}.*\. "
        r"Each needs its own name, such as tap\(h, f'x/\{i\}'\) in a Python loop\.",
        text,
    )


def test_what_can_not_be_tapped_says_why():
    grad = jg.grad(lambda p, f: f(p), taps=True)

    def in_while(p):
        return jax.lax.while_loop(lambda x: x < 3, lambda x: jg.tap(x * 2, "x"), p)

    assert re.fullmatch(
        r"tap 'x' is in the while at .*test_tap.py.*, which has no gradient: use a scan, or a "
        r"fori_loop whose number of iterations is not an array\.",
        message(grad, 1.0, in_while),
    )
    custom = jax.custom_jvp(lambda x: jg.tap(x * 2, "x"))
    custom.defjvp(lambda p, t: (custom(*p), t[0]))
    assert re.fullmatch(
        r"tap 'x' is in the custom_jvp_call at .*, which has a custom derivative, which does "
        r"not pass through the tap: tap what goes into the function, or what it returns\.",
        message(grad, 1.0, custom),
    )
    assert message(grad, 1.0, lambda p: p * 2) == (
        "taps=True, but the loss has no tap: name the values whose gradients you want, "
        "h = jaxgrad.tap(h, 'hidden'), and use what it returns."
    )
    assert message(jg.tap, jnp.arange(3), "n") == (
        "tap 'n' is on int32[3], which is not a float and has no gradient: tap a float that "
        "it is computed from, or that is computed from it."
    )

    def branches(p):
        one = lambda p: jg.tap(p, "x")
        return jax.lax.cond(p > 0, one, lambda p: jg.tap(jnp.ones(2), "x").sum(), p)

    assert re.fullmatch(
        r"tap 'x' differs between the branches of a cond: float32\[2\] at .*, and "
        r"float32\[\] at .*\. Give each a name of its own\.",
        message(grad, 1.0, branches),
    )
