import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg


def test_the_average_is_that_of_pytorchs_formula():
    tx = jg.param_groups({"w": optax.chain(optax.sgd(0.1), jg.params_ema(0.8))})
    params = {"w": jnp.array([1.0, 2.0]), "frozen": jnp.ones(2)}
    trainable, _ = jg.partition(params, "w")
    state = tx.init(trainable)
    seen = []
    for i in range(5):
        grads = {"w": jnp.array([1.0, -1.0]) * i, "frozen": None}
        updates, state = tx.update(grads, state, jg.partition(params, "w")[0])
        params = jg.apply_updates(params, updates)
        seen.append(np.asarray(params["w"]))
    weights = 0.8 ** np.arange(5)[::-1]
    expected = (np.array(seen) * weights[:, None]).sum(0) / weights.sum()
    averaged = jg.averaged_params(params, state)
    np.testing.assert_allclose(averaged["w"], expected, rtol=1e-6)
    assert averaged["frozen"] is params["frozen"]
    assert len(jax.tree.leaves(state)) == 2


def test_averages_of_several_groups_meet():
    group = lambda rate: optax.chain(optax.sgd(rate), jg.params_ema(0.0))
    tx = jg.param_groups({"a": group(1.0), "b": group(2.0)})
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    new = jg.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, jg.averaged_params(params, state), new)


def test_average_errors():
    with pytest.raises(ValueError, match=r"decay=1\.0; it must be at least 0 and below 1"):
        jg.params_ema(1.0)
    tx = jg.params_ema(0.9)
    with pytest.raises(jg.UpdateError, match="averages parameters"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    with pytest.raises(jg.UpdateError, match="this state has no average"):
        jg.averaged_params(jnp.ones(1), optax.sgd(1.0).init(jnp.ones(1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("decay", "rate"), [(0.999, 0.0), (0.99, 0.0), (0.999, 2**-6)])
def test_half_precision_is_averaged_in_float32(dtype, decay, rate):
    tx = optax.chain(optax.sgd(rate), jg.params_ema(decay))
    params, grads = jnp.full(3, 1.5, dtype), jnp.full(3, -1.0, dtype)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = jg.apply_updates(params, updates)
        return (params, state), params[0]

    (params, state), path = jax.jit(
        lambda carry: jax.lax.scan(step, carry, None, 2000), donate_argnums=0
    )((params, tx.init(params)))
    weights = decay ** np.arange(1999, -1, -1.0)
    expected = weights @ np.asarray(path, np.float64) / weights.sum()
    average = jg.averaged_params(params, state)
    assert average.dtype == dtype
    assert abs(float(average[0]) - expected) < 0.01 * expected
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}


def test_wider_dtypes_are_averaged_in_their_own():
    tx = jg.params_ema(0.5)
    with jax.enable_x64(True):
        params = {"w": jnp.array([0.1]), "z": jnp.array([1 + 2j]), "n": jnp.array([3])}
        state = tx.init(params)
        zeros = {name: jnp.zeros_like(x) for name, x in params.items()}
        _, state = tx.update(zeros, state, params)
        average = jg.averaged_params(params, state)
        assert {name: str(x.dtype) for name, x in average.items()} == {
            "w": "float64",
            "z": "complex128",
            "n": "int64",
        }
        jax.tree.map(np.testing.assert_array_equal, average, params)
        assert average["n"] is params["n"]


def test_each_leaf_has_a_weight_and_a_leaf_without_a_step_is_itself():
    tx = jg.param_groups({name: optax.chain(optax.sgd(1.0), jg.params_ema(0.9)) for name in "ab"})
    params = {"a": jnp.ones(1), "b": jnp.full(1, 2.0)}
    state = tx.init(params)
    updates, state = tx.update({"a": jnp.ones(1), "b": None}, state, params)
    average = jax.jit(jg.averaged_params)(jg.apply_updates(params, updates), state)
    np.testing.assert_allclose([*average["a"], *average["b"]], [0.0, 2.0], atol=1e-7)


def test_an_average_of_a_leaf_that_is_missing():
    tx = jg.params_ema(0.9)
    state = tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    half = {"a": jnp.ones(1), "b": None}
    with pytest.raises(jg.UpdateError, match=r"averages 'b', and params has a hole there\. Pass"):
        tx.update(half, state, half)
