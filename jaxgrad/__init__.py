"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgrad._autograd import GradientError, backward, grad, stop_gradient, value_and_grad
from jaxgrad._functional import Apply, functional
from jaxgrad._optim import Assignment, ParamGroups, UpdateError, apply_updates, param_groups
from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select

if TYPE_CHECKING:
    from jaxgrad import callbacks, data, models, torch
    from jaxgrad._audit import Audit, audit
    from jaxgrad._bits import LeakError, assert_frozen
    from jaxgrad._check_grads import GradCheck, check_grads
    from jaxgrad._checkpoint import CheckpointInfo, inspect, load, save
    from jaxgrad._ema import averaged_params, params_ema
    from jaxgrad._features import Features
    from jaxgrad._graph import Equation, Graph, trace
    from jaxgrad._hook import HookError, hook
    from jaxgrad._jaxpr.views import ProgramError
    from jaxgrad._layers import split_layers
    from jaxgrad._leaks import Leak
    from jaxgrad._nonfinite import NonFinite, find_nonfinite
    from jaxgrad._per_example import grad_norms, per_example_grads
    from jaxgrad._picture import Picture, graph
    from jaxgrad._precision import mixed_precision
    from jaxgrad._recipe import AuditError
    from jaxgrad._report import Crossing, Report
    from jaxgrad._runs import Checkpoints
    from jaxgrad._signals import Interrupted
    from jaxgrad._stage import Staged, StageError, stage
    from jaxgrad._store import CheckpointError
    from jaxgrad._tap import TapError, tap
    from jaxgrad._train import NonFiniteLossError, StopTraining, TrainState, fit

__all__ = [
    "Apply",
    "Assignment",
    "Audit",
    "AuditError",
    "CheckpointError",
    "CheckpointInfo",
    "Checkpoints",
    "Crossing",
    "Equation",
    "Features",
    "GradCheck",
    "GradientError",
    "Graph",
    "HookError",
    "Interrupted",
    "Leak",
    "LeakError",
    "MergeError",
    "NonFinite",
    "NonFiniteLossError",
    "ParamGroups",
    "Picture",
    "ProgramError",
    "Report",
    "SelectionError",
    "StageError",
    "Staged",
    "StopTraining",
    "TapError",
    "TrainState",
    "UpdateError",
    "Wrt",
    "apply_updates",
    "assert_frozen",
    "audit",
    "averaged_params",
    "backward",
    "callbacks",
    "check_grads",
    "data",
    "find_nonfinite",
    "fit",
    "functional",
    "grad",
    "grad_norms",
    "graph",
    "hook",
    "inspect",
    "load",
    "merge",
    "mixed_precision",
    "models",
    "param_groups",
    "params_ema",
    "partition",
    "paths",
    "per_example_grads",
    "save",
    "select",
    "split_layers",
    "stage",
    "stop_gradient",
    "tap",
    "torch",
    "trace",
    "value_and_grad",
]

# What the core does not need is loaded when it is first used, and Flax with it only where it is
# needed: importing JAX and Optax takes long enough.
_LAZY = {
    "_audit": ("Audit", "audit"),
    "_bits": ("LeakError", "assert_frozen"),
    "_check_grads": ("GradCheck", "check_grads"),
    "_checkpoint": ("CheckpointInfo", "inspect", "load", "save"),
    "_ema": ("averaged_params", "params_ema"),
    "_features": ("Features",),
    "_graph": ("Equation", "Graph", "trace"),
    "_hook": ("HookError", "hook"),
    "_jaxpr.views": ("ProgramError",),
    "_layers": ("split_layers",),
    "_leaks": ("Leak",),
    "_nonfinite": ("NonFinite", "find_nonfinite"),
    "_per_example": ("grad_norms", "per_example_grads"),
    "_picture": ("Picture", "graph"),
    "_precision": ("mixed_precision",),
    "_recipe": ("AuditError",),
    "_report": ("Crossing", "Report"),
    "_runs": ("Checkpoints",),
    "_signals": ("Interrupted",),
    "_stage": ("Staged", "StageError", "stage"),
    "_store": ("CheckpointError",),
    "_tap": ("TapError", "tap"),
    "_train": ("NonFiniteLossError", "StopTraining", "TrainState", "fit"),
}
_MODULES = ("callbacks", "data", "models", "torch")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxgrad.{name}")
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"jaxgrad.{module}"), name)
    raise AttributeError(f"module 'jaxgrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
