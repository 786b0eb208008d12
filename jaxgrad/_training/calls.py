"""A call: consecutive steps of one batch size that run as one jitted program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# For the rows of one call on a mesh or from a stream; two calls' rows are held at a time.
BYTES_PER_CALL = 64 * 2**20


class Call(NamedTuple):
    """Steps to take in one jitted call."""

    epoch: int
    batches: np.ndarray  # the rows of each step; [at least steps, batch]
    steps: int
    ends_chunk: bool
    positions: Sequence[Any] = ()  # of a stream, after each step

    @property
    def rows(self) -> int:
        return self.steps * self.batches.shape[1]
