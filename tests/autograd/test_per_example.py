import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad.data import digits
from jaxgrad.models import MLP


def message(fun, *args, **kwargs):
    with pytest.raises(jg.RowsError) as info:
        fun(*args, **kwargs)
    return str(info.value)


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), a, b)


@pytest.fixture(scope="module")
def problem():
    apply, params = jg.functional(MLP(64, (16,), 10, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        logits = apply(params, batch["image"])
        hot = jax.nn.one_hot(batch["label"], 10)
        return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))

    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(6, 8, 8)), "float32"),
        "label": jnp.arange(6, dtype="int32"),
    }
    return loss, params, batch


@pytest.mark.parametrize("chunk", [None, 1, 4, 6])
def test_each_row_as_a_batch_of_one(problem, chunk):
    loss, params, batch = problem
    wrt = ["head/**", "!**/bias"]
    grads = jax.jit(jg.per_example_grads(loss, wrt, chunk=chunk))(params, batch)
    assert jg.paths(grads) == ["head/kernel"]
    for i in range(6):
        one = jg.grad(loss, wrt)(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch))
        same(grads["head"]["kernel"][i], one["head"]["kernel"])
    same(jax.tree.map(lambda g: g.mean(0), grads), jg.grad(loss, wrt)(params, batch))


@pytest.mark.parametrize("chunk", [None, 4])
def test_norms_are_those_of_the_gradients(problem, chunk):
    loss, params, batch = problem
    norms = jg.grad_norms(loss, "head/**", chunk=chunk)(params, batch)
    grads = jg.per_example_grads(loss, "head/**")(params, batch)
    same(norms, jax.tree.map(lambda g: jnp.sqrt((g.reshape(6, -1) ** 2).sum(1)), grads))
    same(jax.vmap(optax.tree.norm)(norms), jax.vmap(optax.tree.norm)(grads))


def test_norms_of_half_precision_do_not_overflow():
    loss = lambda p, x: jnp.sum(x * p[None])
    norms = jg.grad_norms(loss)(jnp.ones(4, "float16"), jnp.full((2, 4), 1000, "float16"))
    assert norms.dtype == jnp.float32
    np.testing.assert_allclose(norms, [2000, 2000])


def test_keys_are_split_and_keywords_are_whole():
    def loss(p, x, key, scale):
        return jnp.sum(x * p[None] * jax.random.normal(key, x.shape) * scale[None])

    p, x, key = jnp.ones(2), jnp.ones((3, 2)), jax.random.key(1)
    grads = jg.per_example_grads(loss)(p, x, key, scale=jnp.array([1.0, 10.0]))
    drawn = [jax.random.normal(k, (1, 2))[0] for k in jax.random.split(key, 3)]
    same(grads, jnp.stack(drawn) * jnp.array([[1.0, 10.0]]))


def test_a_batch_without_rows_or_with_several_counts():
    loss = lambda p, *a, **k: p
    text = "per example: the arrays in positional arguments must have the same number of rows "
    fix = "Pass the batch by position, f(params, batch), and what all examples share by keyword."
    assert message(jg.per_example_grads(loss), 1.0, x=jnp.ones(3)) == (
        f"{text}(axis 0): there are no arrays. {fix}"
    )
    assert message(jg.grad_norms(loss), 1.0, {"x": jnp.ones((3, 2))}, jnp.ones(4)) == (
        f"{text}(axis 0): '0/x' has 3 and '1' has 4. {fix}"
    )


@pytest.mark.parametrize("wrong", [7, 123, 300])
def test_the_mislabelled_digit_is_found(wrong):
    """One of 500 digits has a wrong label; by its gradient it is among the first to look at."""
    data = digits().train
    image, label = data["image"][:500], np.array(data["label"][:500])
    label[wrong] = (label[wrong] + 5) % 10
    batch = {"image": jnp.asarray(image), "label": jnp.asarray(label)}
    apply, params = jg.functional(MLP(batch["image"][0].size, (32,), 10, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        logits = apply(params, batch["image"])
        hot = jax.nn.one_hot(batch["label"], 10)
        return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))

    tx = optax.sgd(0.3, momentum=0.9)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jg.grad(loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    norms = jax.vmap(optax.tree.norm)(jax.jit(jg.grad_norms(loss, chunk=64))(params, batch))
    assert wrong in jnp.argsort(-norms)[:5]
