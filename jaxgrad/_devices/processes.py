"""Coordinates several processes: which one prints, and how they agree.

All processes run the same program and compute together on a mesh that they share. The first does
what only one may do (print, write logs, rename a directory). What each observes for itself (a
signal, a directory listing) is agreed on before anything depends on it: processes that took
different branches would wait for each other forever. A single process skips all this.
"""

import json
from typing import TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that prints, writes and renames."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Waits until all processes get here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def greatest(number: int) -> int:
    """The maximum of a number over the processes."""
    if not several():
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(value: T) -> T:
    """Broadcasts the first process's value, anything that JSON can hold."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, length)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes())


def of_all(value: T) -> list[T]:
    """Gathers the values of all processes, anything that JSON can hold."""
    if not several():
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    padded = np.frombuffer(text.ljust(greatest(len(text))), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def whole(x: ArrayLike) -> np.ndarray:
    """An array in host memory, gathered if no process has all of it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
