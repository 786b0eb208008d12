"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgrad._audit import Audit, audit
from jaxgrad._autograd import GradientError, backward, grad, stop_gradient, value_and_grad
from jaxgrad._bits import LeakError, assert_frozen
from jaxgrad._checkpoint import CheckpointError, CheckpointInfo, inspect, load, save
from jaxgrad._functional import Apply, functional
from jaxgrad._graph import Equation, Graph, trace
from jaxgrad._leaks import Leak
from jaxgrad._optim import Assignment, ParamGroups, UpdateError, apply_updates, param_groups
from jaxgrad._picture import Picture, graph
from jaxgrad._recipe import AuditError
from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select
from jaxgrad._stage import Staged, StageError, stage
from jaxgrad._train import NonFiniteLossError, StopTraining, TrainState, fit

if TYPE_CHECKING:
    from jaxgrad import data, models, torch

__all__ = [
    "Apply",
    "Assignment",
    "Audit",
    "AuditError",
    "CheckpointError",
    "CheckpointInfo",
    "Equation",
    "GradientError",
    "Graph",
    "Leak",
    "LeakError",
    "MergeError",
    "NonFiniteLossError",
    "ParamGroups",
    "Picture",
    "SelectionError",
    "StageError",
    "Staged",
    "StopTraining",
    "TrainState",
    "UpdateError",
    "Wrt",
    "apply_updates",
    "assert_frozen",
    "audit",
    "backward",
    "data",
    "fit",
    "functional",
    "grad",
    "graph",
    "inspect",
    "load",
    "merge",
    "models",
    "param_groups",
    "partition",
    "paths",
    "save",
    "select",
    "stage",
    "stop_gradient",
    "torch",
    "trace",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # These load Flax, which takes longer than all else together: only when first used.
    if name in ("data", "models", "torch"):
        return importlib.import_module(f"jaxgrad.{name}")
    raise AttributeError(f"module 'jaxgrad' has no attribute {name!r}")
