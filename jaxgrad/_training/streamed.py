"""Batches from an iterator: Grain's pipelines, or anything that yields trees of arrays.

Such data may be larger than the memory of the machine and be read, shuffled and batched by others.
`fit` takes what comes: batches of one size are put together for a jitted call, the next call's
while the one before runs. Where an iterator can say how far it has come (`get_state`, as Grain's
can), that is part of a checkpoint, and the run goes on with the batch that would have been next.
"""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrad._checkpoint.record import Position
from jaxgrad._devices.placement import OnMesh, Placement
from jaxgrad._text import nbytes
from jaxgrad._training.calls import BYTES_PER_CALL, Call
from jaxgrad._training.job import Job
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.rows import rows_of

T = TypeVar("T")


def stream(
    job: Job, most: int, position: Position, resumable: bool
) -> Iterator[tuple[Call, PyTree, np.ndarray]]:
    """Yields each call with `data` and `batches`, as `feed` does.

    Args:
        job: the call of `fit`; each of several processes yields its own part of the rows.
        most: how many steps a call may take.
        position: where to go on.
        resumable: whether the position must be known.

    Raises:
        ValueError: a pass gives no batch; an iterator has no state, or a batch can't be split.
    """
    made = _calls(job, most, position, resumable)
    with ThreadPoolExecutor(1, "stream") as pool:
        coming = pool.submit(next, made, None)
        while (ready := coming.result()) is not None:
            coming = pool.submit(next, made, None)
            yield ready


def _calls(
    job: Job, most: int, position: Position, resumable: bool
) -> Iterator[tuple[Call, PyTree, np.ndarray]]:
    place, every = job.place, job.callback_every
    widths: dict[int, int] = {}  # of a call, by the rows of its steps: one shape, one compilation

    def call(ends_chunk: bool) -> tuple[Call, PyTree, np.ndarray]:
        steps, rows = len(batches), _rows(batches[0], place)
        width = widths[rows] = max(steps, widths.get(rows, 0))
        padded = batches + batches[-1:] * (width - steps)
        data = jax.tree.map(lambda *xs: _put(place, np.stack(xs), rows), *padded)
        numbers = np.arange(read - steps * rows, read).reshape(steps, rows)
        return Call(epoch, numbers, steps, ends_chunk, positions), data, np.arange(width)

    for epoch in range(position.epoch, job.epochs):
        source = iter(job.dataset)
        if resumable and not hasattr(source, "get_state"):
            raise ValueError(
                f"the iterator of a {type(job.dataset).__name__} can't report its position, so "
                "the run could not be resumed. Use one with get_state and set_state, as "
                "Grain's have, or fit without a checkpoint."
            )
        if position.state is not None:
            source.set_state(_decoded(position.state))  # pyright: ignore
        batches: list[PyTree] = []
        positions: list[Position] = []
        read = position.rows
        for (batch, state), last in _and_last(_with_states(source)):
            rows = _rows(batch, place)
            if batches and rows != _rows(batches[0], place):  # the short one, at the end
                yield call(ends_chunk=False)
                batches, positions = [], []
            read += rows
            taken = position.steps + 1
            position = Position(epoch + 1) if last else Position(epoch, taken, read, state)
            batches.append(batch)
            positions.append(position)
            ends = last or (every is not None and taken % every == 0)
            if ends or len(batches) == min(most, _room(batch)):
                yield call(ends)
                batches, positions = [], []
        if position.epoch == epoch:
            raise ValueError(
                f"the {type(job.dataset).__name__} yields no batch in epoch {epoch + 1}. An "
                "iterator lasts one pass: pass an iterable that can be iterated over again."
            )


def _put(place: Placement, x: np.ndarray, rows: int) -> jax.Array:
    """The batches of a call, `[steps, rows, ...]`, the rows split over the mesh."""
    x = np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))
    if not isinstance(place, OnMesh):
        return jax.numpy.asarray(x)
    split = place.rows(rows)
    if jax.process_count() > 1 and not split.spec:
        place.check_batch(rows)
    sharding = NamedSharding(split.mesh, PartitionSpec(None, *split.spec))
    return jax.make_array_from_process_local_data(sharding, x, (len(x), rows, *x.shape[2:]))


def _rows(batch: PyTree, place: Placement) -> int:
    """The rows of a step, over all processes."""
    return rows_of(batch) * (jax.process_count() if isinstance(place, OnMesh) else 1)


def _room(batch: PyTree) -> int:
    """How many such batches fit in a call."""
    return max(1, BYTES_PER_CALL // max(1, sum(map(nbytes, jax.tree.leaves(batch)))))


def _with_states(source: Iterator[PyTree]) -> Iterator[tuple[PyTree, Any]]:
    """The batches as NumPy arrays, and the state of the iterator after each."""
    get_state = getattr(source, "get_state", None)
    for batch in source:
        yield jax.tree.map(np.asarray, batch), _encoded(get_state()) if get_state else None


def _and_last(items: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last."""
    ahead = next(items, None)
    while ahead is not None:
        item, ahead = ahead, next(items, None)
        yield item, ahead is None


def _encoded(state: Any) -> Any:
    """The state as JSON can hold it."""
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _decoded(state: Any) -> Any:
    is_bytes = isinstance(state, dict) and state.keys() == {"base64"}
    return base64.b64decode(state["base64"]) if is_bytes else state
