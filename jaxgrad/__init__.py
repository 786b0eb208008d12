"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgrad._autograd.grad import backward, grad, stop_gradient, value_and_grad
from jaxgrad._autograd.loss import GradientError
from jaxgrad._functional.functional import Apply, functional
from jaxgrad._optim.apply_updates import UpdateError, apply_updates
from jaxgrad._optim.param_groups import Assignment, ParamGroups, param_groups
from jaxgrad._tree.flat import paths
from jaxgrad._tree.select import MergeError, merge, partition, select
from jaxgrad._tree.wrt import SelectionError, Wrt

if TYPE_CHECKING:
    from jaxgrad import callbacks, data, models, torch
    from jaxgrad._audit.audit import audit
    from jaxgrad._audit.result import Audit
    from jaxgrad._audit.rules import Leak
    from jaxgrad._audit.train_step import AuditError
    from jaxgrad._autograd.hook import HookError, hook
    from jaxgrad._autograd.mixed_precision import mixed_precision
    from jaxgrad._autograd.per_example import grad_norms, per_example_grads
    from jaxgrad._autograd.tap import TapError, tap
    from jaxgrad._checkpoint.arrays import CheckpointError
    from jaxgrad._checkpoint.params import CheckpointInfo, inspect, load, save
    from jaxgrad._checkpoint.run import Checkpoints
    from jaxgrad._debug.check_grads import GradCheck, check_grads
    from jaxgrad._debug.nonfinite import NonFinite, find_nonfinite
    from jaxgrad._devices.signals import Interrupted
    from jaxgrad._drawing.picture import Picture, graph
    from jaxgrad._jaxpr.graph import Equation, Graph, trace
    from jaxgrad._jaxpr.views import ProgramError
    from jaxgrad._optim.ema import averaged_params, params_ema
    from jaxgrad._staging.features import Features
    from jaxgrad._staging.report import Crossing, Report
    from jaxgrad._staging.stage import Staged, StageError, stage
    from jaxgrad._training.fit import fit
    from jaxgrad._training.state import NonFiniteLossError, StopTraining, TrainState
    from jaxgrad._tree.bitwise import LeakError, assert_frozen
    from jaxgrad._tree.split_layers import split_layers

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
    "_audit.audit": ("audit",),
    "_audit.result": ("Audit",),
    "_audit.rules": ("Leak",),
    "_audit.train_step": ("AuditError",),
    "_autograd.hook": (
        "HookError",
        "hook",
    ),
    "_autograd.mixed_precision": ("mixed_precision",),
    "_autograd.per_example": (
        "grad_norms",
        "per_example_grads",
    ),
    "_autograd.tap": (
        "TapError",
        "tap",
    ),
    "_checkpoint.arrays": ("CheckpointError",),
    "_checkpoint.params": (
        "CheckpointInfo",
        "inspect",
        "load",
        "save",
    ),
    "_checkpoint.run": ("Checkpoints",),
    "_debug.check_grads": (
        "GradCheck",
        "check_grads",
    ),
    "_debug.nonfinite": (
        "NonFinite",
        "find_nonfinite",
    ),
    "_devices.signals": ("Interrupted",),
    "_drawing.picture": (
        "Picture",
        "graph",
    ),
    "_jaxpr.graph": (
        "Equation",
        "Graph",
        "trace",
    ),
    "_jaxpr.views": ("ProgramError",),
    "_optim.ema": (
        "averaged_params",
        "params_ema",
    ),
    "_staging.features": ("Features",),
    "_staging.report": (
        "Crossing",
        "Report",
    ),
    "_staging.stage": (
        "Staged",
        "StageError",
        "stage",
    ),
    "_training.fit": ("fit",),
    "_training.state": (
        "NonFiniteLossError",
        "StopTraining",
        "TrainState",
    ),
    "_tree.bitwise": (
        "LeakError",
        "assert_frozen",
    ),
    "_tree.split_layers": ("split_layers",),
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
