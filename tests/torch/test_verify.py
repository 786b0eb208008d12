"""Comparison with recorded outputs: what passes, and what the refusals say."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad.torch as jt


def identity(params, x):
    return x


def refused(outputs, expected, **kwargs):
    with pytest.raises(jt.MappingError) as caught:
        jt.verify({}, None, outputs, expected, apply=identity, **kwargs)
    return str(caught.value)


def test_the_largest_difference_and_where_it_is():
    expected = np.array([[1.0, 2.5]])
    compared = jt.verify({}, None, jnp.array([[1.0, 2.0]]), expected, apply=identity, atol=1)
    assert compared == jt.Comparison(0.5, 2.5, "[0, 1]")
    assert str(compared) == "max error 0.5 at [0, 1], outputs up to 2.5"


def test_over_tolerance():
    message = refused(jnp.array([1.0, 2.0, 3.0]), np.array([1.0, 2.1, 3.5]), atol=0.05)
    assert message.startswith(
        "2 of 3 outputs differ by more than 0.05 + 1e-05 * abs(expected): max error 0.5 at [2], "
        "outputs up to 3.5. Check the epsilons"
    )


def test_tolerances_add_up():
    at, limit = jnp.array([101.0]), np.array([100.0])
    jt.verify({}, None, at, limit, apply=identity, atol=0.5, rtol=0.0051)
    refused(at, limit, atol=0.5, rtol=0.0049)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_equal_to_its_like_only(value):
    jt.verify({}, None, jnp.array([value]), np.array([value]), apply=identity)
    assert "1 of 1 outputs differ" in refused(jnp.array([value]), np.array([1.0]))
    assert "1 of 1 outputs differ" in refused(jnp.array([1.0]), np.array([value]))


def test_shapes():
    message = refused(jnp.zeros((1, 4, 4, 3)), np.zeros((1, 3, 4, 4)))
    assert "has shape (1, 4, 4, 3) and the recorded one (1, 3, 4, 4): PyTorch puts" in message


def test_trees_of_outputs():
    out = {"a": jnp.zeros(2), "b": jnp.ones(1)}
    compared = jt.verify(
        {}, None, out, {"a": np.zeros(2), "b": np.array([2.0])}, apply=identity, atol=2
    )
    assert compared.at == "['b'][0]"
    assert "the outputs are [\"['a']\"" in refused({"a": jnp.zeros(2)}, {"b": np.zeros(2)})


def test_several_arguments():
    def add(params, a, b):
        return a + b

    jt.verify({}, None, (jnp.ones(2), jnp.ones(2)), np.full(2, 2.0), apply=add)


def test_what_can_not_be_called():
    with pytest.raises(jt.MappingError, match="a dict can't be called: pass apply="):
        jt.verify({}, None, jnp.ones(1), np.ones(1))


def test_the_model_runs_in_inference_mode_and_is_not_changed():
    bn = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    model = nnx.Sequential(bn, nnx.Dropout(0.9, rngs=nnx.Rngs(0)))
    x = jnp.array([[3.0, 5.0]])
    jt.verify(model, None, x, np.asarray(x) / np.sqrt(1 + 1e-5))
    np.testing.assert_array_equal(bn.mean[...], np.zeros(2))
    assert bn.use_running_average is False
