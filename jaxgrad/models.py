"""The Flax models that the commands train.

The parts of each model are named by what one would freeze: a trunk of `layers`, and a `head`.
"""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """A multilayer perceptron: linear layers with ReLU between them, and a linear head.

    Args:
        features: the number of inputs, 784 for a picture of 28 x 28.
        hidden: the widths of the hidden layers.
        classes: the number of outputs.
        rngs: where the initial weights are drawn from.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> from flax import nnx
        >>> from jaxgrad.models import MLP
        >>> apply, params = jg.functional(MLP(hidden=(16,), rngs=nnx.Rngs(0)))
        >>> jg.paths(params)
        ['head/bias', 'head/kernel', 'layers/0/bias', 'layers/0/kernel']
        >>> apply(params, jnp.ones((2, 784))).shape
        (2, 10)

    Source: the model that the PyTorch tutorial loads from `mnist_model.pt`.
    """

    def __init__(
        self,
        features: int = 784,
        hidden: Sequence[int] = (512, 512, 256),
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
    ):
        widths = (features, *hidden)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, `[rows, classes]`, of `x`, `[rows, ...]` with the rest flattened."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)
