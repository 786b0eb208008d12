"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select
from jaxgrad._stage import Staged, StageError, stage

__all__ = [
    "MergeError",
    "SelectionError",
    "StageError",
    "Staged",
    "Wrt",
    "merge",
    "partition",
    "paths",
    "select",
    "stage",
]
