import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg

X = jnp.arange(8.0).reshape(4, 2)
KEY = jax.random.key(7)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.trunk = Block(rngs)
        self.head = Block(rngs)

    def __call__(self, x):
        return self.head(self.trunk(x))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(2, name="linear")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)  # by attribute
        return nn.Dropout(0.5, name="drop")(x, not train)  # by position


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return LinenBlock(name="head")(LinenBlock(name="trunk")(x, train), train)


def nnx_model(wrt):
    return *jg.functional(Net(nnx.Rngs(0)), wrt=wrt), {}


def linen_model(wrt):
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, False)
    return *jg.functional(model, variables, wrt=wrt), {"train": True}


KINDS = pytest.mark.parametrize("make", [nnx_model, linen_model])


def flat(tree):
    return dict(zip(jg.paths(tree), jax.tree.leaves(tree), strict=True))


@KINDS
def test_params_are_a_plain_dict_of_what_is_trained(make):
    apply, params, _ = make("**")
    assert type(params) is dict
    leaves = ("linear/bias", "linear/kernel", "norm/bias", "norm/scale")
    assert jg.paths(params) == [f"{b}/{leaf}" for b in ("head", "trunk") for leaf in leaves]
    prefix = "batch_stats/" if make is linen_model else ""
    assert jg.paths(apply.stats) == [
        f"{prefix}{b}/norm/{leaf}" for b in ("head", "trunk") for leaf in ("mean", "var")
    ]


@KINDS
def test_inference_is_deterministic_and_by_running_statistics(make):
    apply, params, flags = make("**")
    flags = {"train": True} if flags else {}  # even where the flag asks for training
    y = apply(params, X, **flags)
    np.testing.assert_array_equal(y, apply(params, X, **flags))
    if not flags:
        np.testing.assert_allclose(y, jax.jit(apply)(params, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[:1], apply(params, X[:1], **flags), rtol=1e-6)
    moved = jax.tree.map(lambda s: s + 1, apply.stats)
    assert not np.allclose(y, apply(params, X, stats=moved, **flags))


@KINDS
def test_training_moves_statistics_and_draws_from_the_key(make):
    apply, params, flags = make("**")
    y, stats = jax.jit(lambda p, k: apply.train(p, X, key=k, **flags))(params, KEY)
    assert jax.tree.structure(stats) == jax.tree.structure(apply.stats)
    assert all(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (stats, apply.stats)), strict=True)
    )
    again, _ = apply.train(params, X, key=KEY, **flags)
    np.testing.assert_allclose(y, again, rtol=1e-4)
    other, _ = apply.train(params, X, key=jax.random.key(8), **flags)
    assert ((y == 0) != (other == 0)).any()
    _, further = apply.train(params, X, stats=stats, key=KEY, **flags)
    once, twice = flat(stats), flat(further)
    assert all((once[path] != twice[path]).any() for path in once)


@KINDS
def test_frozen_layers_stay_in_inference_mode(make):
    apply, params, flags = make("head/**")
    _, stats = apply.train(params, X, key=KEY, **flags)
    before, after = flat(apply.stats), flat(stats)
    for path in before:
        assert (before[path] == after[path]).all() == ("trunk" in path)
    apply, params, flags = make("**/bias")  # trains something in every layer
    after = flat(apply.train(params, X, key=KEY, **flags)[1])
    assert all((after[path] != before[path]).any() for path in before)


@KINDS
def test_frozen_dropout_is_off(make):
    apply, params, flags = make("head/linear/**")
    y, stats = apply.train(params, X, key=KEY, **flags)  # no norm trained, so none moves
    for path, before in flat(apply.stats).items():
        np.testing.assert_array_equal(flat(stats)[path], before)
    expected = apply(params, X, **flags)
    kept = np.asarray(y) != 0  # the head's dropout has no parameters; its block is trained
    assert kept.any() and not kept.all()
    np.testing.assert_allclose(y[kept], 2 * expected[kept], rtol=1e-6)


@KINDS
def test_gradients_and_statistics_in_one_step(make):
    apply, params, flags = make("head/**")

    def loss(params, x, stats, key):
        y, stats = apply.train(params, x, stats=stats, key=key, **flags)
        return (y**2).mean(), stats

    step = jax.jit(jg.value_and_grad(loss, wrt="head/**", has_aux=True))
    (_, stats), grads = step(params, X, apply.stats, KEY)
    assert {path.split("/")[0] for path in jg.paths(grads)} == {"head"}
    assert jax.tree.structure(stats) == jax.tree.structure(apply.stats)


@KINDS
def test_training_without_a_key(make):
    apply, params, flags = make("**")
    with pytest.raises(
        ValueError, match=r"draws random numbers .* not passed a key.*key=jax.random.key"
    ):
        apply.train(params, X, **flags)


def test_the_module_is_left_alone():
    model = Net(nnx.Rngs(0))
    before = jax.tree.leaves(model)
    apply, params = jg.functional(model, wrt="head/**")
    apply.train(params, X, key=KEY)
    assert all(a is b for a, b in zip(before, jax.tree.leaves(model), strict=True))
    assert not model.trunk.drop.deterministic


def test_tied_parameters_are_one_leaf():
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
            self.head = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
            self.head.kernel = self.embed.kernel

        def __call__(self, x):
            return self.head(self.embed(x))

    apply, params = jg.functional(Tied(nnx.Rngs(0)))
    assert jg.paths(params) == ["embed/kernel"]
    w = params["embed"]["kernel"]
    np.testing.assert_allclose(apply(params, X), X @ w @ w, rtol=1e-5)
    grads = jg.grad(lambda p: apply(p, X).sum())(params)
    by_hand = jax.grad(lambda w: (X @ w @ w).sum())(w)
    np.testing.assert_allclose(grads["embed"]["kernel"], by_hand, rtol=1e-5)


def test_a_model_without_statistics_or_noise():
    apply, params = jg.functional(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    y, stats = apply.train(params, X)
    assert apply.stats == stats == {}
    np.testing.assert_allclose(y, apply(params, X), rtol=1e-6)


def test_params_of_another_structure():
    apply, params, _ = nnx_model("**")
    with pytest.raises(
        ValueError, match="params does not have the model's structure: missing 'head/l"
    ):
        apply({"trunk": params["trunk"]}, X)
    with pytest.raises(ValueError, match=r"stats .*; unexpected 'mean'"):
        apply(params, X, stats={"mean": jnp.ones(2)})
    apply, params, flags = linen_model("**")
    with pytest.raises(ValueError, match="the model has 4 leaves that params lacks: 'head/linear"):
        apply({"trunk": params["trunk"]}, X, **flags)


@KINDS
def test_a_half_is_no_model(make):
    apply, params, flags = make("**")
    trainable, _ = jg.partition(params, "!head/linear/bias")
    with pytest.raises(ValueError, match="params has holes at 'head/linear/bias': it is one half"):
        apply(trainable, X, **flags)


def test_linen_layers_whose_mode_nobody_gives():
    class Bare(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, name="drop")(nn.BatchNorm(name="norm")(x))

    variables = {
        "params": {"norm": {"bias": jnp.zeros(2), "scale": jnp.ones(2)}},
        "batch_stats": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}},
    }
    apply, params = jg.functional(Bare(), variables)
    np.testing.assert_allclose(apply(params, X), X / np.sqrt(1 + 1e-5), rtol=1e-6)
    y, stats = apply.train(params, X, key=KEY)
    assert (stats["batch_stats"]["norm"]["mean"] != 0).all()
    assert (y == 0).any()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (LinenNet(), "needs its variables, including 'params': functional(model, model.init("),
        (
            eqx.nn.Linear(2, 2, key=KEY),
            "takes a Flax module (NNX or Linen), not Linear. An Equinox module or a dict of",
        ),
    ],
)
def test_what_is_no_flax_model(model, text):
    with pytest.raises(TypeError) as info:
        jg.functional(model)
    assert text in str(info.value)


def test_a_wrt_that_matches_nothing():
    with pytest.raises(jg.SelectionError, match="Did you mean 'head'"):
        jg.functional(Net(nnx.Rngs(0)), wrt="haed/**")
