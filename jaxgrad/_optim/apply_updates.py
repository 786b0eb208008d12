"""Adds updates with holes to the parameters: a frozen leaf is returned as the same object."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxgrad._text import spec
from jaxgrad._tree.flat import Flat, PyTree, check_same_structure, flatten, is_hole
from jaxgrad._tree.select import refuse_tied
from jaxgrad._tree.types import Grads

T = TypeVar("T")


class UpdateError(ValueError):
    """Updates that do not fit the parameters or the state: the message names the paths."""

    __module__ = "jaxgrad"


def apply_updates(params: T, updates: Grads) -> T:
    """Adds updates to parameters; where an update is a hole, the parameter stays the same array.

    Args:
        params: any pytree, or one half of a partition.
        updates: a tree of the structure of `params`, with `None` for leaves to leave alone.

    Returns:
        The new parameters, in the dtypes of `params`.

    Raises:
        UpdateError: the structures or a shape differ, or there is an update for a hole.
        SelectionError: an NNX parameter is tied (see `select`).

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> params = {"head": jnp.ones(2), "trunk": jnp.ones(3)}
        >>> new = jg.apply_updates(params, {"head": jnp.full(2, -0.1), "trunk": None})
        >>> print(new["head"], new["trunk"] is params["trunk"])
        [0.9 0.9] True

    Source: `optax.apply_updates`, which needs an update for every leaf; the `Optimizer.step` of
    PyTorch, which passes over a parameter whose `grad` is None.
    """
    refuse_tied(params)
    p, u = flatten(params), flatten(updates)
    check_same_structure(p, u, "params", "updates", UpdateError)
    return p.treedef.unflatten([_apply(p, i, update) for i, update in enumerate(u.leaves)])


def _apply(params: Flat, i: int, update: PyTree) -> Any:
    param = params.leaves[i]
    if is_hole(update):
        return param
    if is_hole(param):
        raise UpdateError(
            f"there is an update for '{params.paths[i]}' but no parameter. Apply updates to the "
            "tree that was differentiated."
        )
    if jnp.result_type(update) == jax.dtypes.float0:  # what jax.grad returns for an integer
        return param
    if jnp.shape(param) != jnp.shape(update):
        raise UpdateError(
            f"the update for '{params.paths[i]}' is {spec(update)}, but the parameter is "
            f"{spec(param)}."
        )
    # As optax.apply_updates does: add in the wider dtype, return the parameter's.
    with jax.numpy_dtype_promotion("standard"):
        moved = jnp.asarray(param + update).astype(jnp.result_type(param))
    # XLA on CPU flushes subnormals to zero, so even adding -0.0 would lose one.
    return jnp.where(update == 0, param, moved)
