"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

from jaxgrad._autograd import GradientError, backward, grad, stop_gradient, value_and_grad
from jaxgrad._functional import Apply, functional
from jaxgrad._graph import Equation, Graph, trace
from jaxgrad._optim import Assignment, ParamGroups, UpdateError, apply_updates, param_groups
from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select
from jaxgrad._stage import Staged, StageError, stage

__all__ = [
    "Apply",
    "Assignment",
    "Equation",
    "GradientError",
    "Graph",
    "MergeError",
    "ParamGroups",
    "SelectionError",
    "StageError",
    "Staged",
    "UpdateError",
    "Wrt",
    "apply_updates",
    "backward",
    "functional",
    "grad",
    "merge",
    "param_groups",
    "partition",
    "paths",
    "select",
    "stage",
    "stop_gradient",
    "trace",
    "value_and_grad",
]
