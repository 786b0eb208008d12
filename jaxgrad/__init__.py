"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

from jaxgrad._autograd import GradientError, backward, grad, stop_gradient, value_and_grad
from jaxgrad._checkpoint import CheckpointError, CheckpointInfo, inspect, load, save
from jaxgrad._functional import Apply, functional
from jaxgrad._optim import Assignment, ParamGroups, UpdateError, apply_updates, param_groups
from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select
from jaxgrad._train import NonFiniteLossError, StopTraining, TrainState, fit

__all__ = [
    "Apply",
    "Assignment",
    "CheckpointError",
    "CheckpointInfo",
    "GradientError",
    "MergeError",
    "NonFiniteLossError",
    "ParamGroups",
    "SelectionError",
    "StopTraining",
    "TrainState",
    "UpdateError",
    "Wrt",
    "apply_updates",
    "backward",
    "fit",
    "functional",
    "grad",
    "inspect",
    "load",
    "merge",
    "param_groups",
    "partition",
    "paths",
    "save",
    "select",
    "stop_gradient",
    "value_and_grad",
]
