import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg

BEFORE = {"head": jnp.ones(2), "trunk": {"a": jnp.array([0.0, np.nan, 1.0]), "b": jnp.ones((2, 2))}}


def after(**trunk):
    return {"head": jnp.zeros(2), "trunk": BEFORE["trunk"] | trunk}


def error_of(before, after, wrt="head"):
    with pytest.raises(jg.LeakError) as info:
        jg.assert_frozen(before, after, wrt)
    return str(info.value)


def test_what_is_trained_may_move_and_a_nan_is_itself():
    jg.assert_frozen(BEFORE, after(), "head")


def test_paths_and_the_largest_change_are_named():
    assert error_of(BEFORE, after(b=jnp.array([[1.0, 1.5], [0.75, 1.0]]))) == (
        "1 frozen leaf changed: 'trunk/b' by up to 0.5 (2 of 4 elements). "
        "jaxgrad.audit(loss, params, batch, tx, wrt=...) says why."
    )
    both = after(a=jnp.zeros(3), b=jnp.zeros((2, 2)))
    assert "2 frozen leaves changed: 'trunk/a' by up to nan (2 of 3 elements), " in error_of(
        BEFORE, both
    )


def test_the_sign_of_a_zero_and_the_payload_of_a_nan_are_bits():
    alone = "only in its bits (the sign of a zero, or the payload of a NaN) (1 of 3 elements)"
    assert alone in error_of(BEFORE, after(a=jnp.array([-0.0, np.nan, 1.0])))
    other_nan = np.asarray(BEFORE["trunk"]["a"]).copy()
    other_nan.view(np.uint32)[1] ^= 1
    assert np.isnan(other_nan[1])
    assert alone in error_of(BEFORE, after(a=other_nan))


def test_all_dtypes_are_compared():
    tree = {
        "half": jnp.ones(2, jnp.bfloat16),
        "int": jnp.arange(2),
        "bool": jnp.ones(1, bool),
        "complex": jnp.ones(2, jnp.complex64),
        "key": jax.random.key(0),
        "number": 2.0,
        "trained": jnp.ones(1),
    }
    jg.assert_frozen(tree, dict(tree), "trained")
    others = {
        "half": jnp.array([1, 1.0078125], jnp.bfloat16),
        "int": jnp.array([0, 2]),
        "bool": jnp.zeros(1, bool),
        "complex": jnp.array([1, 1j], jnp.complex64),
        "key": jax.random.key(1),
        "number": 2.5,
    }
    for name, other in others.items():
        assert f"1 frozen leaf changed: '{name}' by up to" in error_of(
            tree, tree | {name: other}, "trained"
        )


def test_another_dtype_shape_or_structure():
    text = error_of(BEFORE, after(b=jnp.ones((2, 2), jnp.bfloat16)))
    assert "'trunk/b' from float32[2,2] to bfloat16[2,2]" in text
    assert "from float32[2,2] to float32[4]" in error_of(BEFORE, after(b=jnp.ones(4)))
    assert "from float32[2,2] to a hole" in error_of(BEFORE, after(b=None))
    assert "after has 1 leaf that before lacks: 'trunk/c'" in error_of(BEFORE, after(c=1.0))


def test_wrt_must_fit():
    with pytest.raises(jg.SelectionError, match="Did you mean 'head'"):
        jg.assert_frozen(BEFORE, BEFORE, "haed")
