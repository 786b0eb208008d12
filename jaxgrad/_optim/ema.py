"""An exponential moving average of the trained parameters, as an Optax transformation.

Optax averages updates (`optax.ema`), not parameters. As a transformation, the average is part of
the optimizer's state: it is jitted with the step, saved and resumed with the run, sharded like the
parameters, and kept for trained leaves only, since it sees no others.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jaxgrad._optim.apply_updates import UpdateError, apply_updates
from jaxgrad._tree.flat import PyTree, flatten, is_hole

T = TypeVar("T")


class EmaState(NamedTuple):
    """Weighted sums of the parameters, and the sum of the weights: the average is their ratio."""

    weight: jax.Array
    sums: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters, and leaves the updates as they are.

    Args:
        decay: the weight of the average against the new parameters, from 0 to below 1.

    Returns:
        An `optax.GradientTransformation` to put last in a chain: what it averages is the parameters
        after the updates that reach it. `averaged_params` reads the average.

    Raises:
        ValueError: `decay` is not in [0, 1).
        UpdateError: `update` was called without `params`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxgrad as jg
        >>> tx = optax.chain(optax.sgd(1.0), jg.params_ema(0.5))
        >>> params = jnp.array(0.0)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.array(-3.0), state, params)
        ...     params = jg.apply_updates(params, updates)
        >>> print(params, jg.averaged_params(params, state))
        6.0 5.0

    Source: `torch.optim.swa_utils.AveragedModel` with `get_ema_avg_fn`; the bias of the first steps
    is corrected as in Adam (Kingma and Ba, 2015).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay}; it must be at least 0 and below 1.")

    def init(params: PyTree) -> EmaState:
        return EmaState(jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: object
    ) -> tuple[PyTree, EmaState]:
        if params is None:
            raise UpdateError(
                "params_ema averages parameters and was not passed any: call "
                "tx.update(grads, state, params)."
            )
        new = apply_updates(params, updates)
        sums = jax.tree.map(lambda s, p: decay * s + (1 - decay) * p, state.sums, new)
        return updates, EmaState(decay * state.weight + (1 - decay), sums)

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(params: T, opt_state: PyTree) -> T:
    """Returns the parameters, each leaf that `params_ema` averages replaced by its average.

    Args:
        params: all parameters, or the trainable half.
        opt_state: the state of an optimizer with `params_ema` in it, once or in several groups.

    Returns:
        The tree of `params`; frozen leaves are those given.

    Raises:
        UpdateError: the state has no average, or no step has been taken yet.

    Example:
        >>> import jax.numpy as jnp, optax, jaxgrad as jg
        >>> tx = optax.chain(optax.sgd(1.0), jg.params_ema(0.9))
        >>> jg.averaged_params(jnp.ones(2), tx.init(jnp.ones(2)))
        Traceback (most recent call last):
            ...
        jaxgrad.UpdateError: there is no average yet: no step has been taken.

    Source: `AveragedModel.module`.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, EmaState))
    states = [node for node in nodes if isinstance(node, EmaState)]
    if not states:
        raise UpdateError("this state has no average: add params_ema to the optimizer.")
    if any(state.weight == 0 for state in states):
        raise UpdateError("there is no average yet: no step has been taken.")
    averages: dict[str, Any] = {}
    for state in states:
        sums = flatten(state.sums)
        averages |= {
            path: (leaf / state.weight).astype(leaf.dtype)
            for path, leaf in zip(sums.paths, sums.leaves, strict=True)
            if not is_hole(leaf)
        }
    flat = flatten(params)
    return flat.treedef.unflatten(
        [averages.get(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True)]
    )
