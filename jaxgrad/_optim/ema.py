"""An exponential moving average of the trained parameters, as an Optax transformation.

Optax averages updates (`optax.ema`), not parameters. As a transformation, the average is part of
the optimizer's state: it is jitted with the step, saved and resumed with the run, sharded like the
parameters, and kept for trained leaves only, since it sees no others.

The sums are in at least float32: near a decay of 1 a step adds less than half precision resolves.
Each leaf has a weight of its own, so that a leaf that is unfrozen later starts its own average.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxgrad._optim.apply_updates import UpdateError, apply_updates
from jaxgrad._text import listed
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, is_hole

T = TypeVar("T")


class EmaState(NamedTuple):
    """Weighted sums of each parameter, and the sums of the weights: the average is their ratio.

    Both have the structure of the parameters, with holes for leaves that are not floats, and are in
    at least float32.
    """

    weights: PyTree
    sums: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Returns a transformation that averages the parameters, and leaves the updates as they are.

    Args:
        decay: the weight of the average against the new parameters, from 0 to below 1.

    Returns:
        An `optax.GradientTransformation` to put last in a chain: what it averages is the parameters
        after the updates that reach it. `averaged_params` reads the average. The state holds one
        array per leaf, in at least float32 whatever the dtype of the parameters, and a scalar
        weight. Leaves that are not floats have no average.

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
        flat = flatten(params)
        wide = [_wide(leaf) for leaf in flat.leaves]
        weights = [None if d is None else jnp.zeros((), jnp.finfo(d).dtype) for d in wide]
        sums = [
            None if d is None else jnp.zeros_like(leaf, d)
            for leaf, d in zip(flat.leaves, wide, strict=True)
        ]
        return EmaState(flat.treedef.unflatten(weights), flat.treedef.unflatten(sums))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: object
    ) -> tuple[PyTree, EmaState]:
        if params is None:
            raise UpdateError(
                "params_ema averages parameters and was not passed any: call "
                "tx.update(grads, state, params)."
            )
        new = apply_updates(params, updates)
        weights = jax.tree.map(lambda w: decay * w + (1 - decay), state.weights)
        sums, leaves = flatten(state.sums), flatten(new).leaves
        _refuse_holes(sums, leaves)
        added = [
            s if is_hole(s) else decay * s + (1 - decay) * jnp.asarray(p, s.dtype)
            for s, p in zip(sums.leaves, leaves, strict=True)
        ]
        return updates, EmaState(weights, sums.treedef.unflatten(added))

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(params: T, opt_state: PyTree) -> T:
    """Returns the parameters, each leaf that `params_ema` averages replaced by its average.

    Args:
        params: all parameters, or the trainable half.
        opt_state: the state of an optimizer with `params_ema` in it, once or in several groups.

    Returns:
        The tree of `params` in its dtypes; frozen leaves are those given, and so is a leaf that has
        taken no step since it is trained. Works under `jit`.

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
    kept: dict[str, tuple[jax.Array, jax.Array]] = {}
    for state in states:
        sums, weights = flatten(state.sums), flatten(state.weights)
        of_leaves = zip(sums.paths, sums.leaves, weights.leaves, strict=True)
        kept |= {path: (s, w) for path, s, w in of_leaves if not is_hole(s)}
    if all(not isinstance(w, Tracer) and w == 0 for _, w in kept.values()):
        raise UpdateError("there is no average yet: no step has been taken.")
    flat = flatten(params)
    return flat.treedef.unflatten(
        [
            _average(x, *kept[p]) if p in kept and not is_hole(x) else x
            for p, x in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def _average(param: Any, total: jax.Array, weight: jax.Array) -> jax.Array:
    dtype = jnp.result_type(param)
    average = total / jnp.where(weight == 0, 1, weight).astype(total.dtype)
    return jnp.where(weight == 0, jnp.asarray(param), average.astype(dtype))


def _refuse_holes(sums: Flat, leaves: list[Any]) -> None:
    holes = [
        f"'{path}'"
        for path, s, p in zip(sums.paths, sums.leaves, leaves, strict=True)
        if not is_hole(s) and is_hole(p)
    ]
    if holes:
        raise UpdateError(
            f"params_ema averages {listed(holes)}, and params has a hole there. Pass the tree that "
            "the state was made for: tx.init(params)."
        )


def _wide(leaf: Any) -> Any:
    """The dtype to sum a leaf in; None for a hole and for what is not a float."""
    if not is_array(leaf) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return None
    return np.promote_types(jnp.result_type(leaf), np.float32)
