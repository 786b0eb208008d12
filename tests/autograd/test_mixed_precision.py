import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg


def test_mixed_precision_computes_in_half_and_keeps_masters_in_full():
    seen = {}

    def loss(params, batch, key=None):
        seen.update(w=params["w"].dtype, x=batch["x"].dtype, i=batch["i"].dtype)
        h = batch["x"] @ params["trunk"] @ params["w"]
        return (h**2).mean()

    params = {"w": jnp.full((4, 2), 1 / 3), "trunk": jnp.eye(4)}
    dataset = {"x": jnp.ones((8, 4)), "i": jnp.arange(8)}
    half = jg.mixed_precision(loss)
    state = jg.fit(half, params, dataset, jg.param_groups({"w": optax.sgd(1e-4)}), batch_size=4)
    assert seen == {"w": jnp.bfloat16, "x": jnp.bfloat16, "i": jnp.int32}
    assert state.params["w"].dtype == jnp.float32 and state.losses.dtype == np.float32
    moved = np.asarray(state.params["w"] - params["w"])
    assert (moved != 0).all() and (np.abs(moved) < 2**-9).all()  # less than bfloat16 could hold
    with pytest.raises(ValueError, match="dtype='int8'; it must be a floating-point dtype"):
        jg.mixed_precision(loss, "int8")


# Loss scaling: the product of the factors of `small`, 3e-9, is 0 in float16.

PARAMS = {"small": jnp.float32(1.0), "large": jnp.full(3, 0.5)}
BATCH = {"a": jnp.full((4, 1), 1e-4), "b": jnp.arange(12.0).reshape(4, 3) / 12}


def faint(params, batch):
    small = jnp.mean(batch["a"] * params["small"] * 3e-5)
    return small + jnp.mean((batch["b"] @ params["large"]) ** 2) / 4


scaled = functools.partial(jg.mixed_precision, dtype="float16", loss_scale=2**15)
WANT = jax.value_and_grad(faint)(PARAMS, BATCH)


def close(got, want=WANT, rtol=0.02):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol), got, want)


def test_without_a_scale_a_small_gradient_vanishes():
    assert jg.grad(jg.mixed_precision(faint, "float16"))(PARAMS, BATCH)["small"] == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_scaled_loss_has_the_value_and_the_gradients_of_the_loss(compiled):
    run = jg.value_and_grad(scaled(faint))
    value, grads = (jax.jit(run) if compiled else run)(PARAMS, BATCH)
    close((value, grads))
    assert value.dtype == grads["small"].dtype == jnp.float32


def test_a_scaled_loss_with_aux_and_microbatches_and_per_example():
    with_aux = scaled(lambda p, b: (faint(p, b), {"twice": 2 * faint(p, b)}))
    (value, aux), grads = jg.value_and_grad(with_aux, has_aux=True)(PARAMS, BATCH)
    close((value, grads))
    close(aux["twice"], 2 * value)
    close(jg.value_and_grad(scaled(faint), microbatches=2)(PARAMS, BATCH))
    each = jg.per_example_grads(scaled(faint))(PARAMS, BATCH)
    close(jax.tree.map(lambda g: g.mean(0), each), WANT[1])


def test_second_derivatives_of_a_scaled_loss():
    def cubic(w, x):
        return jnp.mean((x * w) ** 3)

    w, x = jnp.float32(0.5), jnp.full(4, 1.25)
    half = scaled(cubic, loss_scale=2**10)  # in a Hessian the second derivative is scaled too
    want = jax.grad(jax.grad(cubic))(w, x)
    close(jax.grad(jax.grad(half))(w, x), want)
    close(jax.hessian(half)(w, x), want)


def test_a_scaled_loss_is_staged_and_trains():
    params = {"trunk": jnp.eye(30)[:3], **PARAMS}

    def loss(p, b):
        h = b["b"] @ p["trunk"]
        for _ in range(9):
            h = jnp.tanh(h @ p["trunk"].T @ p["trunk"])
        return faint(p, {"a": b["a"], "b": h @ p["trunk"].T})

    want = jax.value_and_grad(loss)(params, BATCH)
    staged = jg.stage(scaled(loss), params, BATCH, "!trunk")
    trainable, _ = jg.partition(params, "!trunk")
    value, grads = jax.value_and_grad(staged.loss)(trainable, staged.prepare(BATCH))
    close(value, want[0])
    close({k: grads[k] for k in PARAMS}, {k: want[1][k] for k in PARAMS})
    assert "custom" not in str(staged), staged
    tx = optax.chain(optax.scale(1e6), optax.sgd(1.0))
    state = jg.fit(scaled(loss), params, BATCH, tx, wrt="!trunk", batch_size=4, stage=True)
    assert state.staging.startswith("the frozen part runs once")
    close(1 - state.params["small"], 1e6 * want[1]["small"])


def test_what_is_excluded_has_unscaled_gradients_too():
    def loss(params, batch):
        return faint({**params, "small": params["small"].astype(batch["a"].dtype)}, batch)

    close(jg.value_and_grad(scaled(loss, exclude="params/small"))(PARAMS, BATCH))
    z = jnp.array([1 + 2j])  # complex numbers have no half precision
    close(jax.grad(scaled(lambda z: jnp.mean(jnp.abs(z) ** 2)))(z), 2 * z.conj())


@pytest.mark.parametrize("scale", [0, -1, float("inf"), float("nan"), True, "big"])
def test_scales_that_are_refused(scale):
    with pytest.raises(ValueError, match=r"loss_scale=.*; it must be a positive number, as 2"):
        jg.mixed_precision(faint, "float16", loss_scale=scale)


def test_a_scale_that_the_dtype_of_the_loss_cannot_hold():
    half = jg.mixed_precision(lambda w, x: jnp.mean(x * w), "float16", loss_scale=2**17)
    with pytest.raises(ValueError, match="loss_scale=131072 is more than 65504, the most that fl"):
        half(jnp.ones(3), jnp.ones(3))
    wide = jg.mixed_precision(
        lambda w, x: jnp.mean((x * w).astype(jnp.float32)), "float16", loss_scale=2**17
    )
    close(jax.grad(wide)(jnp.ones(3), jnp.ones(3)), jnp.full(3, 1 / 3))


# What is not cast.


def dtypes_in(*args, exclude=None, **kwargs):
    seen = {}

    def loss(params, batch, *rest, stats=None, scale=None):
        given = {"params": params, "batch": batch, "rest": rest, "stats": stats, "scale": scale}
        leaves = zip(jg.paths(given), jax.tree.leaves(given), strict=True)
        seen.update({path: str(leaf.dtype) for path, leaf in leaves})
        return jnp.float32(0.0)

    jg.mixed_precision(loss, exclude=exclude)(*args, **kwargs)
    return {path for path, dtype in seen.items() if dtype == "float32"}


ARGS = {"head": jnp.ones(2), "norm": jnp.ones(2)}, {"x": jnp.ones(2), "y": jnp.ones(2)}


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (None, set()),
        ("batch/y", {"batch/y"}),
        ("batch", {"batch/x", "batch/y"}),
        (["**/y", "params/norm"], {"batch/y", "params/norm"}),
        (lambda path, leaf: path.endswith("d"), {"params/head"}),
        ("rest/1", {"rest/1"}),
        ("scale", {"scale"}),
    ],
)
def test_exclude_goes_by_the_names_of_the_arguments(exclude, kept):
    rest = jnp.ones(1), jnp.ones(1)
    assert dtypes_in(*ARGS, *rest, scale=jnp.ones(1), exclude=exclude) == kept


def test_an_exclude_that_matches_nothing():
    with pytest.raises(jg.SelectionError) as info:
        dtypes_in(*ARGS, exclude="batch/z")
    assert str(info.value).startswith(
        "exclude pattern 'batch/z' matches no leaf. Did you mean 'batch/y'"
    )
    with pytest.raises(jg.SelectionError, match=r"exclude=.* takes no array of the arguments: '"):
        dtypes_in(*ARGS, exclude=lambda path, leaf: False)


def test_statistics_are_never_in_half_precision():
    mean = {"bn": {"mean": jnp.zeros(2)}}
    assert dtypes_in(*ARGS, stats=mean) == {"stats/bn/mean"}
    assert dtypes_in(*ARGS, stats=jnp.zeros(2)) == {"stats"}
    variables = {"params": {"w": jnp.ones(2)}, "batch_stats": mean}
    assert dtypes_in(variables, ARGS[1]) == {"params/batch_stats/bn/mean"}


def test_statistics_of_an_nnx_module_stay_as_they_are():
    model = nnx.BatchNorm(2, use_running_average=True, rngs=nnx.Rngs(0))

    def loss(model, x):
        assert (model.scale.dtype, model.mean.dtype) == (jnp.bfloat16, jnp.float32)
        return jnp.mean((x * model.scale[...][None]) ** 2)

    jg.mixed_precision(loss)(model, jnp.ones((3, 2)))
