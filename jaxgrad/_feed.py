"""The rows of the coming steps, brought to where the steps run.

On one device the dataset lies there whole, and a step picks its rows by number. On a mesh it stays
where it is, in host memory or in a memory-mapped file, and may be larger than all devices: while
a call runs, the rows of the next one are gathered and put on the mesh. Each process reads
those that its own devices take, in the order in which one device would take them.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad._messages import nbytes
from jaxgrad._select import PyTree
from jaxgrad._sharding import OnMesh, Placement

# Of the rows of one call on a mesh; two calls' rows are held at a time.
_BYTES_PER_CALL = 64 * 2**20


class _Call(Protocol):
    @property
    def batches(self) -> np.ndarray: ...


C = TypeVar("C", bound=_Call)


def steps_per_call(place: Placement, dataset: PyTree, batch_size: int, most: int) -> int:
    """How many steps a call may take for its rows to fit."""
    if not isinstance(place, OnMesh):
        return most
    batch = sum(nbytes(x) // len(x) for x in jax.tree.leaves(dataset)) * batch_size
    return max(1, min(most, _BYTES_PER_CALL // max(batch, 1)))


def feed(
    place: Placement, dataset: PyTree, calls: Iterator[C]
) -> Iterator[tuple[C, PyTree, np.ndarray]]:
    """Yields each call with `data` and `batches`; step `i` is to take `data[batches[i]]`."""
    if not isinstance(place, OnMesh):
        data = jax.tree.map(jnp.asarray, dataset)
        for call in calls:
            yield call, data, call.batches
        return
    host = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, dataset)
    with ThreadPoolExecutor(1, "rows") as pool:
        coming: tuple[C, Future[PyTree]] | None = None
        for call in calls:
            ready, coming = coming, (call, pool.submit(_gather, place, host, call.batches))
            if ready:
                yield _fed(*ready)
        if coming:
            yield _fed(*coming)


def _fed(call: C, data: Future[PyTree]) -> tuple[C, PyTree, np.ndarray]:
    return call, data.result(), np.arange(len(call.batches))


def _gather(place: OnMesh, dataset: PyTree, batches: np.ndarray) -> PyTree:
    """The rows of each step, `[steps, batch, ...]`, the batch split over the mesh."""
    rows = place.rows(batches.shape[1])
    sharding = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))

    def put(x: Any) -> jax.Array:
        shape = (*batches.shape, *x.shape[1:])
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)

        def part(index: Any) -> np.ndarray:
            return np.asarray(x[batches[index[:2]]], dtype)

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, dataset)
