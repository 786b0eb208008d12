"""The Flax models that the commands train.

The parts of each model are named by what one would freeze: the trunk, `layers`, and the `head`.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nnx.Module):
    """A multilayer perceptron: linear layers with ReLU between them, and a linear head.

    Args:
        features: the number of inputs, 784 for an image of 28 x 28.
        hidden: the widths of the hidden layers.
        classes: the number of outputs.
        rngs: the generator of the initial weights.

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


class ConvBlock(nnx.Module):
    """A 3 x 3 convolution, batch normalization, ReLU, and 2 x 2 max pooling.

    Args:
        channels_in: the number of input channels.
        channels: the number of output channels.
        rngs: the generator of the initial weights.
    """

    def __init__(self, channels_in: int, channels: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels_in, channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `[rows, height / 2, width / 2, channels]` of `[rows, height, width, in]`."""
        return nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), strides=(2, 2))


class CNN(nnx.Module):
    """A small convolutional network: blocks that halve the image, a mean over it, a head.

    Args:
        channels_in: the number of channels of an image.
        channels: the number of channels of each block.
        classes: the number of outputs.
        rngs: the generator of the initial weights.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> from flax import nnx
        >>> from jaxgrad.models import CNN
        >>> apply, params = jg.functional(CNN(channels=(8,), rngs=nnx.Rngs(0)))
        >>> jg.paths(params["layers"])
        ['0/conv/kernel', '0/norm/bias', '0/norm/scale']
        >>> apply(params, jnp.ones((2, 28, 28, 1))).shape
        (2, 10)

    Source: Ioffe and Szegedy, "Batch Normalization", https://arxiv.org/abs/1502.03167, for the
    order of convolution, normalization and ReLU.
    """

    def __init__(
        self,
        channels_in: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
    ):
        sizes = itertools.pairwise((channels_in, *channels))
        self.layers = nnx.List([ConvBlock(a, b, rngs=rngs) for a, b in sizes])
        self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, `[rows, classes]`, of images `[rows, height, width, channels]`."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """A pre-norm Transformer block: attention and a two-layer perceptron, each added to its input.

    Args:
        width: the width of a token.
        heads: the number of attention heads.
        hidden: the width of the perceptron.
        rngs: the generator of the initial weights.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens, `[rows, tokens, width]`, to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class ViT(nnx.Module):
    """A vision Transformer: patches as tokens, a class token, pre-norm blocks, and a linear head.

    Args:
        picture: height, width and channels of an image; the sides are multiples of `patch`.
        patch: the side of a square patch.
        width: the width of a token.
        depth: the number of blocks.
        heads: the number of attention heads per block.
        classes: the number of outputs.
        rngs: the generator of the initial weights.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> from flax import nnx
        >>> from jaxgrad.models import ViT
        >>> make = lambda: ViT((28, 28, 1), patch=7, depth=2, rngs=nnx.Rngs(0))
        >>> apply, params = jg.functional(nnx.eval_shape(make))  # shapes only, at no cost
        >>> jg.select(params, ["head", "layers/1"])
        <Selection: 446,794 of 905,098 elements (49.4%), in 18 of 40 leaves>
        >>> jax.eval_shape(apply, params, jnp.ones((2, 28, 28, 1))).shape
        (2, 10)

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
    """

    def __init__(
        self,
        picture: tuple[int, int, int] = (28, 28, 1),
        patch: int = 7,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        classes: int = 10,
        *,
        rngs: nnx.Rngs,
    ):
        height, breadth, channels = picture
        tokens = (height // patch) * (breadth // patch) + 1
        draw = nnx.initializers.normal(0.02)
        self.patches = nnx.Conv(channels, width, (patch, patch), strides=(patch, patch), rngs=rngs)
        self.token = nnx.Param(draw(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(draw(rngs.params(), (1, tokens, width)))
        self.layers = nnx.List([Block(width, heads, 4 * width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, `[rows, classes]`, of images `[rows, height, width, channels]`."""
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))
