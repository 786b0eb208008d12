"""Optimizers that take more than gradients: the value of the loss, and the loss as a function."""

import inspect

import optax


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation with an `update` that takes extra arguments, and ignores unknown ones.

    Unlike `optax.with_extra_args_support` it goes by the signature: `optax.MultiSteps` hands extra
    arguments on to what it wraps, and is no `GradientTransformationExtraArgs`.
    """
    kinds = {p.kind for p in inspect.signature(tx.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
