"""What flows through the functions that train: names for pytrees by their role, and the loss."""

from typing import Any, Protocol, TypeAlias

from jax.typing import ArrayLike

from jaxgrad._tree.flat import PyTree

Params: TypeAlias = PyTree
"""Parameters: a dict, an NNX module or state, an Equinox module, or any other pytree of arrays."""

Grads: TypeAlias = PyTree
"""The structure of the parameters, with arrays for selected leaves and `None` for the rest."""

Batch: TypeAlias = PyTree
"""Arrays whose axis 0 is the examples: those of a step, or of a dataset."""

OptState: TypeAlias = PyTree
"""The state of an Optax transformation."""


class Loss(Protocol):
    """A pure function of parameters, and usually a batch, to a real scalar."""

    def __call__(self, params: Any, /, *args: Any, **kwargs: Any) -> ArrayLike: ...
