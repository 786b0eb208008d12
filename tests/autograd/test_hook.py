import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg

X = jnp.linspace(-1, 1, 6).reshape(3, 2)


def message(fun, *args):
    with pytest.raises(jg.HookError) as info:
        fun(*args)
    return str(info.value)


def tripled(x):
    return jnp.sum(jg.hook(jnp.sin(x), lambda g: 3 * g) ** 2)


def by_hand(x):
    return 3 * 2 * jnp.sin(x) * jnp.cos(x)


@pytest.mark.parametrize(
    "grad",
    [
        jax.grad(tripled),
        jax.jit(jax.grad(tripled)),
        jax.grad(jax.checkpoint(tripled)),
        jax.vmap(jax.grad(tripled)),
        jax.grad(lambda x: jax.vmap(tripled)(x).sum()),
        jax.grad(lambda x: jax.lax.scan(lambda c, r: (c + tripled(r), None), 0.0, x)[0]),
        lambda x: jg.grad(lambda p: tripled(p["x"]))({"x": x})["x"],
    ],
)
def test_the_cotangent_goes_through_the_function(grad):
    np.testing.assert_allclose(grad(X), by_hand(X), rtol=1e-6)


def test_the_value_stays_and_nothing_is_computed():
    def text(f):
        return jax.jit(f).lower(X).compile().as_text().split("ENTRY")[1].split("metadata")[0]

    assert text(tripled) == text(lambda x: jnp.sum(jnp.sin(x) ** 2))
    assert jg.hook("name", lambda g: g) == "name"


def test_none_observes(capfd):
    def loss(x):
        return jnp.sum(jg.hook(x**2, lambda g: jax.debug.print("{}", g.sum())))

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(X), 2 * X)
    jax.effects_barrier()
    assert capfd.readouterr().out == "6.0\n"


def test_observed_values_reach_python():
    seen = []

    def loss(x):
        return jnp.sum(jg.hook(x * 2, lambda g: jax.debug.callback(seen.append, g)))

    jax.grad(loss)(X)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen, jnp.ones((1, 3, 2)))


def test_vmap_shows_one_example():
    def loss(row):
        return jnp.sum(jg.hook(5 * row, lambda g: g / jnp.linalg.norm(g)))

    rows = jax.vmap(jax.grad(loss))(X)
    np.testing.assert_allclose(rows, jnp.full((3, 2), 5 / 2**0.5), rtol=1e-6)


def test_it_may_use_what_is_there():
    def loss(scale, x):
        def turn(carry, row):
            h = jg.hook(row * carry, lambda g: g * scale * jax.lax.stop_gradient(carry))
            return carry + h.sum(), None

        return jax.lax.scan(turn, 1.0, x)[0]

    def plain(x):
        carry, factors = 1.0, []
        for row in x:
            factors.append(carry)
            carry = carry + (row * carry).sum()
        return factors

    grads = jax.jit(jax.grad(loss, 1))(1.0, X[:1])
    np.testing.assert_allclose(grads, jnp.full((1, 2), plain(X[:1])[0]), rtol=1e-6)
    twice = jax.grad(lambda s: jax.grad(loss, 1)(s, X[:1]).sum())(2.0)
    np.testing.assert_allclose(twice, 2.0, rtol=1e-6)  # the gradient is linear in the scale


def test_trees_have_holes_for_what_is_no_float():
    def loss(x):
        def double(g):
            assert g["n"] is None
            return {"x": 2 * g["x"], "n": None}

        tree = jg.hook({"x": x, "n": jnp.arange(2)}, double)
        return jnp.sum(tree["x"] * tree["n"].astype("float32")[None])

    np.testing.assert_array_equal(jax.grad(loss)(X), jnp.tile(jnp.array([0.0, 2.0]), (3, 1)))


def test_higher_order():
    cube = lambda x: jg.hook(x**3, lambda g: g**2)  # the gradient of 2 cube(x) is 4 * 3 x^2
    first = jax.grad(lambda x: 2 * cube(x))
    assert first(3.0) == 4 * 27
    assert jax.grad(first)(3.0) == 4 * 18
    assert jax.hessian(lambda x: 2 * cube(x))(3.0) == 4 * 18


def test_what_is_no_cotangent_is_refused_where_it_is_written():
    assert message(lambda: jg.hook(X, lambda g: g.sum(0))) == (
        "the hook returns float32[2] for a cotangent of float32[3,2]; a cotangent keeps its shape "
        "and dtype. Use jnp.broadcast_to or .astype(g.dtype)."
    )
    assert message(lambda: jg.hook({"a": X}, lambda g: {"a": g["a"].astype("bfloat16")})) == (
        "the hook returns 'a': bfloat16[3,2] for a cotangent of float32[3,2]; a cotangent keeps "
        "its shape and dtype. Use jnp.broadcast_to or .astype(g.dtype)."
    )
    assert message(lambda: jg.hook({"a": X}, lambda g: g["a"])) == (
        "the hook receives a cotangent of structure PyTreeDef({'a': *}) but returns "
        "PyTreeDef(*). Return the same structure, or None to pass the cotangent on."
    )


@pytest.mark.torch
def test_hooks_are_pytorchs():
    torch = pytest.importorskip("torch")
    x = torch.tensor(np.array(X), requires_grad=True)
    h = torch.sin(x)
    h.register_hook(lambda g: 3 * g)
    (h**2).sum().backward()
    np.testing.assert_allclose(jax.grad(tripled)(X), x.grad.numpy(), rtol=1e-6)
