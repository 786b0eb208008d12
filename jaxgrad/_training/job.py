"""A job: what a call of `fit` asks for, checked before anything is traced, compiled or saved."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._checkpoint.record import Settings
from jaxgrad._devices.placement import Placement
from jaxgrad._devices.processes import from_first
from jaxgrad._training.fingerprint import fingerprint
from jaxgrad._training.objective import Objective, takes
from jaxgrad._tree.flat import PyTree, is_array
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.selection import Selection
from jaxgrad._tree.types import Batch, Loss

Stage: TypeAlias = Literal["auto"] | bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of `fit` that its phases read; see there.

    Raises:
        RowsError: the arrays of the dataset differ in their rows.
        ValueError: a number is out of range, or the loss needs a key and there is none.
    """

    loss: Loss
    dataset: Batch
    tx: optax.GradientTransformation
    selection: Selection
    place: Placement
    epochs: int
    batch_size: int
    key: jax.Array | None
    stats: PyTree
    has_aux: bool
    stage: Stage
    callback_every: int | None
    max_nonfinite_steps: int
    progress: bool

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 0),
            ("batch_size", 1),
            ("callback_every", 1),
            ("max_nonfinite_steps", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}; it must be {least} or more.")
        if self.stage not in ("auto", True, False):
            raise ValueError(f"stage={self.stage!r}; it must be 'auto', True, or False.")
        if not self.streams:
            self.place.check_batch(self.batch_size)
        _ = self.rows, self.given  # for their errors

    @functools.cached_property
    def streams(self) -> bool:
        """Whether the dataset is an iterable of batches instead of a tree of arrays."""
        return is_stream(self.dataset)

    @functools.cached_property
    def rows(self) -> int:
        """The rows of the dataset; 0 for a stream."""
        return 0 if self.streams else rows_of(self.dataset)

    @functools.cached_property
    def objective(self) -> Objective:
        """The loss in the form that the steps call."""
        return Objective(self.loss, "stats" in self.given, self.has_aux)

    @functools.cached_property
    def given(self) -> dict[str, PyTree]:
        """What the loss takes by keyword at the start: the key of the run, and statistics."""
        given = {}
        if takes(self.loss, "key", self.key, "key=jax.random.key(0)"):
            given["key"] = self.place.put(self.key)
        if takes(self.loss, "stats", self.stats, "stats=apply.stats"):
            given["stats"] = self.place.put(jax.tree.map(jnp.asarray, self.stats))
        elif self.stats is not None:
            raise ValueError(
                "fit was passed stats, but the loss takes none: write it as "
                "`def loss(params, batch, stats)`, returning `value, new_stats`."
            )
        return given

    @functools.cached_property
    def settings(self) -> Settings:
        """What decides which rows a step takes."""
        batch_size = 0 if self.streams else self.batch_size
        key = self.key
        words = key if key is None else jax.random.key_data(key).tolist()
        named = None if key is None else f"{jax.random.key_impl(key)} {words}"
        data = {} if self.streams else from_first(fingerprint(self.dataset))
        return Settings(self.rows, batch_size, named, data)

    def batch(self) -> Batch:
        """The shapes and dtypes of the first batch of a dataset of arrays."""
        rows = min(self.batch_size, self.rows)

        def leaf(x: Any) -> jax.ShapeDtypeStruct:
            dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
            dtype = jax.dtypes.canonicalize_dtype(dtype)
            return jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), dtype)

        return jax.tree.map(leaf, self.dataset)


def is_stream(dataset: object) -> bool:
    """Whether a dataset is an iterable of batches and not a tree of arrays."""
    is_leaf = jax.tree_util.default_registry.flatten_one_level(dataset) is None
    return is_leaf and not is_array(dataset) and isinstance(dataset, Iterable)
