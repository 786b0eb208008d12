"""What `fit` returns and hands to callbacks, and the exceptions that end a run early."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.types import OptState, Params

Callback: TypeAlias = Callable[["TrainState"], Mapping[str, float] | None]


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient that is infinite or NaN; the message names the step and the rows.

    Attributes:
        state: the `TrainState` before the step, the last good one.
        rows: the indices of the step's rows in the dataset, `int[batch]`, or in the stream's pass.
    """

    __module__ = "jaxgrad"

    def __init__(self, message: str, state: "TrainState", rows: np.ndarray) -> None:
        super().__init__(message)
        self.state, self.rows = state, rows


class StopTraining(Exception):  # noqa: N818 - it reports no error, as StopIteration
    """Raised by a callback to end `fit`, which then returns what it has."""

    __module__ = "jaxgrad"


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Where a training run stands.

    Attributes:
        params: all parameters, those frozen as they were given.
        opt_state: the state of the optimizer, for the trained leaves only.
        step: the number of steps taken.
        losses: the loss of each step, `float[step]`.
        history: a record for each chunk: `step`, `epoch`, the mean `loss`, `rows_per_s`, `skipped`
            if steps were not finite, the means of the metrics that the loss returns, and what the
            callbacks returned.
        staging: one line: what of the loss runs once and what it gains, or why nothing does.
        resumed: one line: which step the run went on from, what of the optimizer's state was kept,
            added and dropped, and which counters leaves share now. Empty for a new run.
        stats: the statistics after the last step; None if the loss takes none.
    """

    params: Params
    opt_state: OptState
    step: int
    losses: np.ndarray
    history: tuple[dict[str, float], ...]
    staging: str
    resumed: str = ""
    stats: PyTree = None
