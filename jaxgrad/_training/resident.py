"""The rows of the coming steps, brought to where the steps run.

On one device the complete dataset is there, and a step picks its rows by index. On a mesh it stays
in host memory or in a memory-mapped file, and may be larger than all devices: while
a call runs, the rows of the next one are gathered and put on the mesh. Each process reads
those that its own devices take, in the order in which one device would take them.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad._devices.placement import OnMesh, Placement
from jaxgrad._text import nbytes
from jaxgrad._training.calls import BYTES_PER_CALL, Call
from jaxgrad._training.job import Job
from jaxgrad._tree.flat import PyTree


def calls_of(job: Job, most: int, done: int) -> Iterator[Call]:
    """The calls of at most so many steps, after the steps that are done; each in one chunk."""
    full, rest = divmod(job.rows, job.batch_size)
    steps = full + (rest > 0)
    every = job.callback_every or steps
    for epoch in range(done // steps, job.epochs):
        order = np.arange(job.rows) if job.key is None else _shuffled(job.key, epoch, job.rows)
        at = done - epoch * steps if epoch * steps < done else 0
        while at < steps:
            chunk_end = min((at // every + 1) * every, steps)
            end = min(chunk_end, at + most, full) if at < full else steps
            batches = order[at * job.batch_size : end * job.batch_size].reshape(end - at, -1)
            # One shape, so one compilation, for all calls of full batches.
            room = min(most, every, full) - len(batches) if at < full else 0
            padded = np.pad(batches, ((0, room), (0, 0)))
            yield Call(epoch, padded, end - at, end == chunk_end)
            at = end


def _shuffled(key: jax.Array, epoch: int, rows: int) -> np.ndarray:
    # By NumPy: the sort of `jax.random.permutation` takes longer to compile than a small head.
    words = np.asarray(jax.random.key_data(key)).ravel()
    return np.random.default_rng([*words, epoch]).permutation(rows)


def steps_per_call(place: Placement, dataset: PyTree, batch_size: int, most: int) -> int:
    """How many steps a call may take for its rows to fit."""
    if not isinstance(place, OnMesh):
        return most
    batch = sum(nbytes(x) // len(x) for x in jax.tree.leaves(dataset)) * batch_size
    return max(1, min(most, BYTES_PER_CALL // max(batch, 1)))


def feed(
    place: Placement, dataset: PyTree, calls: Iterator[Call]
) -> Iterator[tuple[Call, PyTree, np.ndarray]]:
    """Yields each call with `data` and `batches`; step `i` is to take `data[batches[i]]`."""
    if not isinstance(place, OnMesh):
        data = jax.tree.map(jnp.asarray, dataset)
        for call in calls:
            yield call, data, call.batches
        return
    host = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, dataset)
    with ThreadPoolExecutor(1, "rows") as pool:
        coming: tuple[Call, Future[PyTree]] | None = None
        for call in calls:
            ready, coming = coming, (call, pool.submit(_gather, place, host, call.batches))
            if ready:
                yield _fed(*ready)
        if coming:
            yield _fed(*coming)


def _fed(call: Call, data: Future[PyTree]) -> tuple[Call, PyTree, np.ndarray]:
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
