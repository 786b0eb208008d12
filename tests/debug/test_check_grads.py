import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg
from tests import losses


def verdicts(check):
    return {p.path: p.verdict for p in check.paths}


@jax.custom_vjp
def off_by_sign(x):
    return jnp.sin(x)


off_by_sign.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (-g * jnp.cos(x),))


@jax.custom_vjp
def off_by_a_little(x):
    return jnp.sin(x)


off_by_a_little.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x) * 1.001,))

PARAMS = {"a": jnp.linspace(0.1, 1, 6).reshape(2, 3), "b": jnp.linspace(-1, 1, 40)}


@pytest.mark.parametrize("rule", [off_by_sign, off_by_a_little])
def test_a_wrong_rule_is_found_and_the_right_leaves_are_not_blamed(rule):
    def loss(p):
        return jnp.sum(rule(p["a"])) + jnp.sum(jnp.tanh(p["b"]) ** 3)

    check = jg.check_grads(loss, PARAMS)
    assert verdicts(check) == {"a": "wrong", "b": "right"}
    assert [p.directions for p in check.paths] == [6, 16]
    assert check.precision == "float64"
    with pytest.raises(jg.GradientError) as info:
        check.raise_if_wrong()
    a = check.wrong[0]
    np.testing.assert_allclose(abs(a.difference), jnp.cos(PARAMS["a"][0, 0]), rtol=1e-6)
    assert str(info.value) == (
        f"wrong gradient: 'a' ({a.gradient:.6g}; finite differences give {a.difference:.6g}). "
        "Look for a stop_gradient, or a custom_vjp or custom_jvp whose rule is not the derivative "
        "of its function."
    )


def test_a_large_leaf_is_checked_in_random_directions():
    loss = lambda p: jnp.sum(off_by_a_little(p["b"]))
    assert verdicts(jg.check_grads(loss, PARAMS, wrt="b", directions=3)) == {"b": "wrong"}
    first, again, other = (
        jg.check_grads(loss, PARAMS, wrt="b", directions=3, key=key).paths
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert first == again != other


def test_a_stop_gradient_is_wrong_and_only_the_selected_are_checked():
    loss = lambda p: jnp.sum(jax.lax.stop_gradient(p["a"]) ** 2) + jnp.sum(p["b"])
    assert verdicts(jg.check_grads(loss, PARAMS, wrt="a")) == {"a": "wrong"}
    assert jg.check_grads(loss, PARAMS, wrt="b").raise_if_wrong().wrong == ()


def test_kinks_are_no_errors():
    loss = lambda x: jnp.sum(jnp.maximum(x, 0.0) * jnp.array([3.0, 5.0]))
    check = jg.check_grads(loss, jnp.array([0.0, 1.0]))
    assert verdicts(check) == {"": "right"}  # JAX gives the mean of both sides
    check = jg.check_grads(lambda x: jnp.sum(jax.nn.relu(x)), jnp.array([0.0, 1.0]))
    assert verdicts(check) == {"": "kink"}
    assert check.raise_if_wrong() is check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_inside_is_told_and_allowed_for(dtype):
    def loss(p, wrong):
        h = p["a"].astype(dtype)
        return jnp.sum(off_by_sign(h) if wrong else jnp.sin(h)).astype("float32")

    check = jg.check_grads(loss, PARAMS, False, wrt="a")
    assert (check.precision, verdicts(check)) == (dtype, {"a": "right"})
    assert verdicts(jg.check_grads(loss, PARAMS, True, wrt="a")) == {"a": "wrong"}


def test_casts_of_data_are_no_loss_of_precision():
    labels = jnp.arange(2)
    loss = lambda p: jnp.sum(jax.nn.one_hot(labels, 3, dtype="float32") * jnp.sin(p["a"]))
    assert jg.check_grads(loss, PARAMS, wrt="a").precision == "float64"


def test_complex_leaves():
    right = lambda z: jnp.sum(jnp.abs(z) ** 2) + jnp.sum((z**2).imag)
    z = jnp.array([1 + 2j, -0.5j])
    assert verdicts(jg.check_grads(right, z)) == {"": "right"}
    wrong = lambda z: right(jax.lax.stop_gradient(z)) + jnp.sum(z.real)
    assert verdicts(jg.check_grads(wrong, z)) == {"": "wrong"}


@pytest.mark.parametrize("make", [losses.mlp, losses.nnx_module, losses.equinox_module])
@pytest.mark.slow
def test_models(make):
    case = make()
    check = jg.check_grads(case.loss, case.params, case.data, wrt=case.wrt, directions=4)
    assert check.precision == "float64"
    assert set(verdicts(check).values()) == {"right"}
    assert jnp.ones(()).dtype == jnp.float32  # the configuration is as it was


def test_the_table():
    table = repr(jg.check_grads(lambda p: jnp.sum(p["a"] * 2), {"a": jnp.ones(2), "b": nnx.Rngs}))
    assert table.splitlines() == [
        "path  verdict  directions  gradient  difference",
        "a     right    2           2         2",
        "1 of 1 right, compared in float64",
    ]


def test_a_leaf_without_elements_has_nothing_to_compare():
    params = {"a": jnp.ones(2), "b": jnp.zeros((0, 3))}
    check = jg.check_grads(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"]), params)
    assert verdicts(check) == {"a": "right", "b": "right"}
    assert [p.directions for p in check.paths] == [2, 0]
    wrong = lambda p: jnp.sum(jax.lax.stop_gradient(p["a"])) + jnp.sum(p["b"])
    assert verdicts(jg.check_grads(wrong, params)) == {"a": "wrong", "b": "right"}


def test_nothing_to_check_is_an_error():
    loss = lambda p: jnp.sum(p["a"] ** 2)
    params = {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}
    with pytest.raises(jg.GradientError) as info:
        jg.check_grads(loss, params, wrt="a")
    assert str(info.value) == (
        "there is nothing to check, since no selected leaf has an element: 'a' is float64[0,3]. "
        "Select a leaf with elements."
    )
    with pytest.raises(jg.GradientError, match="directions=0; it must be 1 or more"):
        jg.check_grads(loss, params, directions=0)
