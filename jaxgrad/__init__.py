"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

from jaxgrad._autograd import GradientError, backward, grad, stop_gradient, value_and_grad
from jaxgrad._functional import Apply, functional
from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select

__all__ = [
    "Apply",
    "GradientError",
    "MergeError",
    "SelectionError",
    "Wrt",
    "backward",
    "functional",
    "grad",
    "merge",
    "partition",
    "paths",
    "select",
    "stop_gradient",
    "value_and_grad",
]
