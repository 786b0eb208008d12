"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""

from jaxgrad._select import MergeError, SelectionError, Wrt, merge, partition, paths, select

__all__ = [
    "MergeError",
    "SelectionError",
    "Wrt",
    "merge",
    "partition",
    "paths",
    "select",
]
