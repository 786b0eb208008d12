"""A function of parameters and a batch, compiled, and run over the batches of a dataset.

`evaluate` and `predict` share this. A dataset of arrays stays where it is, on the device, in host
memory or in a memory-mapped file, and one batch after another is brought to the parameters.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad._autograd.loss import call_loss
from jaxgrad._devices.processes import several, whole
from jaxgrad._text import listed
from jaxgrad._training.job import is_stream
from jaxgrad._tree.flat import PyTree, flatten, is_hole
from jaxgrad._tree.rows import RowsError, rows_of
from jaxgrad._tree.types import Batch, Params

Check: TypeAlias = Callable[[Any, int], PyTree]
"""Takes what the function returns for a batch of so many rows; raises, or returns it checked."""


class OverBatches:
    """A function to run over a dataset, compiled once for each number of rows in a batch.

    Args:
        fun: `fun(params, batch)`, or `fun(params, batch, stats=)`.
        check: is traced with `fun`, so that its errors come before anything runs.
        dataset: arrays, or an iterable of batches.
        batch_size: the rows of a batch of arrays.
        name: what errors call `fun`.
        caller: what errors call the function that the user called.

    Raises:
        RowsError: the arrays differ in their rows, or there are none.
        ValueError: `batch_size` is below 1, or the dataset is a stream in one of several processes.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        check: Check,
        dataset: Batch,
        *,
        batch_size: int,
        name: str,
        caller: str,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
            raise ValueError(f"batch_size={batch_size!r}; it must be an integer, 1 or more.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be 1 or more.")
        self.streams = is_stream(dataset)
        if not self.streams:
            rows_of(dataset)  # for its errors
        elif several():
            raise ValueError(
                f"{caller} can't read a {type(dataset).__name__} in {jax.process_count()} "
                "processes, which may each read other batches. Pass a dataset of arrays."
            )
        self.fun, self.dataset, self.batch_size = fun, dataset, int(batch_size)
        self.name, self.caller = name, caller
        self._takes_stats, self._needs_stats = _stats_of(fun)
        self._compiled = _compiled(fun, check)

    def __call__(self, params: Params, stats: PyTree = None) -> Iterator[tuple[int, PyTree]]:
        """Yields the rows of each batch, and what `check` returned for it, in host memory.

        Raises:
            RowsError: a batch has no rows, or a pass gives no batch.
            ValueError: statistics are needed and missing, or given and not taken.
        """
        given = self._stats(stats)
        static, arrays = _taken_apart((params, given))
        place = _placing(arrays)
        ahead: tuple[int, PyTree] | None = None
        for batch in self._batches():
            out = self._compiled(static, arrays, place(batch))
            if ahead is not None:  # while this batch runs
                yield ahead[0], jax.tree.map(whole, ahead[1])
            ahead = rows_of(batch), out
        if ahead is None:
            raise RowsError(
                f"{self.caller}: the {type(self.dataset).__name__} gives no batch. What is used up "
                "by one pass gives none in the next: pass what can be iterated over again."
            )
        yield ahead[0], jax.tree.map(whole, ahead[1])

    def _stats(self, stats: PyTree) -> dict[str, PyTree]:
        """What the function takes by keyword."""
        if stats is None:
            if self._needs_stats:
                raise ValueError(
                    f"{self.name} takes stats, and {self.caller} has none: pass stats=apply.stats, "
                    "or those of a run, state.stats."
                )
            return {}
        if self._takes_stats:
            return {"stats": stats}
        if jax.tree.leaves(stats):
            raise ValueError(
                f"{self.caller} has statistics, and {self.name} takes none, so that the model "
                "would run with those that it had before. Let it take them, "
                "(params, batch, stats), and pass them on: apply(params, x, stats=stats)."
            )
        return {}

    def _batches(self) -> Iterator[Batch]:
        if not self.streams:
            rows = rows_of(self.dataset)
            for start in range(0, rows, self.batch_size):
                count = min(self.batch_size, rows - start)
                part = functools.partial(_part, start=start, count=count)
                yield _refusing_text(jax.tree.map(part, self.dataset))
            return
        fix = "Each element of an iterable is a batch; Grain's .batch(n) makes batches of examples."
        for batch in self.dataset:
            batch = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), batch)
            rows_of(batch, "a batch of the dataset", fix)
            yield _refusing_text(batch)


def _part(x: Any, start: int, count: int) -> jax.Array | np.ndarray:
    if isinstance(x, jax.Array):  # one compilation for all batches, which a slice would not be
        return jax.lax.dynamic_slice_in_dim(x, start, count)
    return np.asarray(x[start : start + count])


def _refusing_text(batch: Batch) -> Batch:
    """The batch, if JAX can hold its arrays."""

    def is_refused(x: Any) -> bool:
        return isinstance(x, np.ndarray) and x.dtype.kind in "OSUmM"

    if any(map(is_refused, jax.tree.leaves(batch))):
        flat = flatten(batch)
        found = listed(
            f"'{path}' is {x.dtype}{list(x.shape)}"
            for path, x in zip(flat.paths, flat.leaves, strict=True)
            if is_refused(x)
        )
        raise ValueError(
            f"the dataset has what JAX can't hold: {found}. Encode it as numbers, or leave it out."
        )
    return batch


def _placing(arrays: list[Any]) -> Callable[[Batch], Batch]:
    """How batches get to the devices of the parameters: on a mesh the rows are split over them."""
    shardings = (x.sharding for x in arrays if isinstance(x, jax.Array))
    several_devices = (s for s in shardings if len(s.device_set) > 1)
    sharding = next((s for s in several_devices if isinstance(s, NamedSharding)), None)
    if sharding is None:
        return lambda batch: batch
    mesh = sharding.mesh
    axis = "data" if "data" in mesh.axis_names else mesh.axis_names[0]

    def put(x: jax.Array | np.ndarray) -> jax.Array:
        spec = PartitionSpec(axis) if len(x) % mesh.shape[axis] == 0 else PartitionSpec()
        split = NamedSharding(mesh, spec)
        if isinstance(x, jax.Array) and not several():
            return jax.device_put(x, split)
        x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.make_array_from_callback(x.shape, split, lambda index: x[index])

    return lambda batch: jax.tree.map(put, batch)


# Compilation.


class _Static:
    """What of a tree is not an array: its structure, functions, Python numbers, holes."""

    def __init__(self, treedef: Any, others: list[Any]) -> None:
        self.treedef, self.others = treedef, others
        self.key = (treedef, *map(_key, others))

    def merge(self, arrays: list[Any]) -> PyTree:
        left = iter(arrays)
        return self.treedef.unflatten([next(left) if x is _ARRAY else x for x in self.others])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_ARRAY = object()  # stands where an array was


def _key(x: object) -> Any:
    """Tells static leaves apart as a traced program would: 1, 1.0 and True are three values."""
    if is_hole(x) or x is _ARRAY:
        return x
    try:
        hash(x)
    except TypeError:
        return id(x)
    return type(x), repr(x) if isinstance(x, float | complex) else x


def _taken_apart(tree: PyTree) -> tuple[_Static, list[Any]]:
    """The arrays, and the rest: `jax.jit` takes no function, and would trace a Python bool."""
    flat = flatten(tree)
    arrays = [x for x in flat.leaves if hasattr(x, "dtype")]
    others = [_ARRAY if hasattr(x, "dtype") else x for x in flat.leaves]
    return _Static(flat.treedef, others), arrays


_KNOWN: weakref.WeakKeyDictionary[Callable[..., Any], dict[Check, Callable[..., PyTree]]] = (
    weakref.WeakKeyDictionary()
)


def _compiled(fun: Callable[..., Any], check: Check) -> Callable[..., PyTree]:
    """The compiled function, the same one for the same `fun`, as `jax.jit` has it."""
    try:
        known, of = _KNOWN.setdefault(fun, {}), weakref.ref(fun)
    except TypeError:  # it has no hash, or no weak reference
        return _jitted(lambda: fun, check)
    if check not in known:
        known[check] = _jitted(of, check)  # not `fun` itself, which would keep it alive
    return known[check]


def _jitted(of: Callable[[], Callable[..., Any] | None], check: Check) -> Callable[..., PyTree]:
    def call(static: _Static, arrays: list[Any], batch: Batch) -> PyTree:
        fun = of()
        assert fun is not None  # whoever calls this holds it
        params, keywords = static.merge(arrays)
        out = call_loss(fun, params, (batch,), keywords, "the function")
        return check(out, rows_of(batch))

    return jax.jit(call, static_argnums=0)


def _stats_of(fun: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a function takes an argument `stats`, and whether it must be given."""
    try:
        parameter = inspect.signature(fun).parameters.get("stats")
    except (TypeError, ValueError):  # built in
        return False, False
    if parameter is None:
        return False, False
    return True, parameter.default is inspect.Parameter.empty
