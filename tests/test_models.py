import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import MLP


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
