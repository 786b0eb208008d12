"""Modules that chains of PyTorch layers need and Flax does not have.

Arrays in a chain have their channels last, as Flax's convolutions expect.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

Array: TypeAlias = jax.Array
Layer: TypeAlias = nnx.Module | Callable[..., Array]
"""A module that can be called, or a function of one array."""


class Chain(nnx.Module):
    """Layers that run one after another, under their PyTorch names.

    So `features.0.weight` is at `features/0/kernel`. A layer may run more than once.

    Args:
        layers: modules, or functions of one array, by name, in PyTorch's registration order.
        forward: names of layers, or functions of one array, in the order in which they run; by
            default the layers in their own order.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> from flax import nnx
        >>> chain = jg.torch.Chain({"fc": nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "act": jax.nn.relu})
        >>> chain(jnp.ones((1, 3))).shape
        (1, 2)

    Source: `torch.nn.Sequential`.
    """

    __module__ = "jaxgrad.torch"

    def __init__(
        self,
        layers: Mapping[str, Layer],
        forward: Sequence[str | Callable[[Array], Array]] | None = None,
    ):
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.forward = tuple(layers if forward is None else forward)

    def __call__(self, x: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        """Runs the layers.

        Args:
            x: the input; images as (batch, height, width, channels).
            rngs: for dropout, in training.

        Returns:
            The output of the last layer.
        """
        for step in self.forward:
            layer = self._at(step) if isinstance(step, str) else step
            takes_rngs = isinstance(layer, Chain | nnx.Dropout)
            x = layer(x, rngs=rngs) if takes_rngs else layer(x)
        return x

    def _at(self, name: str) -> Layer:
        layer = self
        for part in name.split("."):
            layer = getattr(layer, part)
        return layer


class Flatten(nnx.Module):
    """Flattens all axes but the first, channels first, as PyTorch does.

    The features are in PyTorch's order, so the next layer's weights need no permutation. The cost
    is one transpose of the activations.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> x = jnp.arange(4).reshape(1, 2, 1, 2)  # height 2, width 1, channels 2
        >>> jg.torch.Flatten()(x)
        Array([[0, 2, 1, 3]], dtype=int32)

    Source: `torch.nn.Flatten`.
    """

    __module__ = "jaxgrad.torch"

    def __call__(self, x: Array) -> Array:
        """Flattens (batch, *spatial, channels) to (batch, channels * spatial)."""
        return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
