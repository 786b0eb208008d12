"""Random networks with random selections: staged and unstaged are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad as jg
from jaxgrad._staging import min_cut

WIDTH = 4

# Each takes a value of [rows, WIDTH], another one, and a weight; some mix the examples.
LAYERS = {
    "dense": lambda h, g, w: jnp.tanh(h @ w),
    "residual": lambda h, g, w: h + jnp.sin(g @ w),
    "product": lambda h, g, w: h * jax.nn.sigmoid(g),
    "norm": lambda h, g, w: jax.nn.standardize(h, axis=-1, epsilon=1e-2) * w[:1],
    "attend": lambda h, g, w: jnp.einsum("bi,bj,ij->bj", h, g, w),
    "relu": lambda h, g, w: jax.nn.relu(h),
    "checkpoint": lambda h, g, w: jax.checkpoint(lambda h, g: jnp.cos(h @ w) * g)(h, g),
    "scan": lambda h, g, w: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=2)[0],
    "roll": lambda h, g, w: jnp.roll(h, 1, axis=1) - g,
    "center": lambda h, g, w: h - g.mean(0, keepdims=True),
    "shift": lambda h, g, w: h + jnp.roll(g, 1, axis=0),
    "batch size": lambda h, g, w: h / h.shape[0] + g,
    "position": lambda h, g, w: h + jnp.arange(h.shape[0], dtype=h.dtype)[:, None],
}


@st.composite
def networks(draw):
    depth = draw(st.integers(1, 6))
    kinds = [draw(st.sampled_from(list(LAYERS))) for _ in range(depth)]
    inputs = [(draw(st.integers(0, i)), draw(st.integers(0, i))) for i in range(depth)]
    weights = [draw(st.integers(0, depth - 1)) for _ in range(depth)]  # some are shared
    trained = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    return kinds, inputs, weights, trained, draw(st.integers(0, 2**16))


@pytest.fixture(autouse=True, scope="module")
def _storing_is_cheap():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(min_cut, "FLOPS_PER_BYTE", 1e-6)
        yield


@given(networks())
@settings(max_examples=25, deadline=None)
def test_staged_is_unstaged(network):
    kinds, inputs, weights, trained, seed = network
    draw = np.random.default_rng(seed).normal

    def loss(params, batch):
        values = [batch]
        for kind, (i, j), k in zip(kinds, inputs, weights, strict=True):
            values.append(LAYERS[kind](values[i], values[j], params["w"][k]))
        return jnp.mean(values[-1] @ params["head"]), values[len(values) // 2]

    with jax.enable_x64(True):
        params = {
            "w": [jnp.asarray(draw(size=(WIDTH, WIDTH))) for _ in kinds],
            "head": jnp.asarray(draw(size=(WIDTH, 1))),
        }
        wrt = {"w": trained, "head": True}
        data = jnp.asarray(draw(size=(7, WIDTH)))
        staged = jg.stage(loss, params, data[:3], wrt)
        features = staged.prepare(data)
        trainable, frozen = jg.partition(params, wrt)
        rows = np.array([6, 2, 2, 5])
        ours = jax.value_and_grad(staged.loss, has_aux=True)(trainable, features[rows])
        theirs = jax.value_and_grad(
            lambda p, batch: loss(jg.merge(p, frozen), batch), has_aux=True
        )(trainable, data[rows])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
