import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import CNN, MLP, ViT


def test_mlp_is_linear_layers_with_relu_between():
    apply, params = jg.functional(MLP(6, (5, 4), 3, rngs=nnx.Rngs(0)))
    x = jnp.linspace(-1, 1, 12).reshape(2, 2, 3)
    h = np.asarray(x).reshape(2, 6)
    for i in (0, 1):
        layer = params["layers"][i]
        h = np.maximum(h @ layer["kernel"] + layer["bias"][None], 0)
    expected = h @ params["head"]["kernel"] + params["head"]["bias"][None]
    np.testing.assert_allclose(apply(params, x), expected, rtol=1e-5)


def test_mlp_is_the_tutorials_by_default():
    shapes = [leaf.shape for leaf in jg.functional(MLP(rngs=nnx.Rngs(0)))[1]["layers"][0].values()]
    assert shapes == [(512,), (784, 512)]


def test_cnn_averages_what_its_blocks_find():
    apply, params = jg.functional(CNN(2, (3, 4), 5, rngs=nnx.Rngs(0)))
    x = jnp.linspace(-1, 1, 2 * 8 * 8 * 2).reshape(2, 8, 8, 2)
    assert apply(params, x).shape == (2, 5)
    norm = {"bias": jnp.full(4, 0.5), "scale": jnp.zeros(4)}
    last = {**params["layers"][1], "norm": norm}
    zero = {**params, "layers": {**params["layers"], 1: last}}
    head = params["head"]
    expected = jnp.full((2, 4), 0.5) @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(apply(zero, x), expected, rtol=1e-5)


@pytest.mark.slow
def test_vit_reads_the_class_token_and_knows_where_a_patch_is():
    model = ViT((8, 8, 1), patch=4, width=8, depth=1, heads=2, classes=3, rngs=nnx.Rngs(0))
    apply, params = jg.functional(model)
    x = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    moved = jnp.roll(x, 4, axis=1)  # the same patches in another order
    assert apply(params, x).shape == (1, 3)
    assert jnp.abs(apply(params, x) - apply(params, moved)).max() > 1e-5
    nowhere = {**params, "positions": params["positions"] * 0}
    np.testing.assert_allclose(apply(nowhere, x), apply(nowhere, moved), rtol=1e-4, atol=1e-6)
