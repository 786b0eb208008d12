"""The records of a run: the loss of each step, a line per chunk, steps that were not finite."""

import dataclasses

import numpy as np

from jaxgrad._checkpoint.record import Position
from jaxgrad._training.calls import Call
from jaxgrad._training.steps import Taken


@dataclasses.dataclass
class Log:
    """What has happened so far, and since the last entry of the history."""

    step: int
    losses: np.ndarray
    history: list[dict[str, float]]
    position: Position  # in a stream
    metrics: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of finite steps
    rows: int = 0
    seconds: float = 0.0
    skipped: int = 0
    in_a_row: int = 0

    def add(self, call: Call, taken: Taken, skip: int) -> int | None:
        """Adds a call; returns its first step beyond `skip` consecutive non-finite ones, if any."""
        values, finite = taken.losses, taken.finite[: call.steps]
        for name, of_steps in taken.metrics.items():
            before = self.metrics.get(name, of_steps[:0])
            self.metrics[name] = np.concatenate([before, of_steps[: call.steps][finite]])
        for i, good in enumerate(finite):
            self.in_a_row = 0 if good else self.in_a_row + 1
            self.skipped += not good
            if self.in_a_row > skip:
                # Nothing moved from here on, nor in the skipped steps before.
                losses = np.concatenate([self.losses, values[: i + 1]])
                self.step += i - skip
                self.position = dict(enumerate(call.positions)).get(i - skip - 1, self.position)
                self.losses = losses[: self.step]
                return i
        self.losses = np.concatenate([self.losses, values[: call.steps]])
        self.step += call.steps
        self.position = (call.positions or [self.position])[-1]
        self.rows += call.rows
        return None

    @property
    def line(self) -> str:
        """The last loss, and the rows per second."""
        return f"loss {self.losses[-1]:.4f}  {self.rows / self.seconds:,.0f} rows/s"

    def close_chunk(self, epoch: int) -> None:
        """Adds the entry of a chunk."""
        since = int(self.history[-1]["step"]) if self.history else 0
        losses = self.losses[since:]
        mean = float(losses[np.isfinite(losses)].mean()) if np.isfinite(losses).any() else np.nan
        record = {"step": self.step, "epoch": epoch, "loss": mean}
        record |= {"rows_per_s": self.rows / self.seconds}
        if self.skipped:
            record |= {"skipped": self.skipped}
        for name, values in self.metrics.items():
            record[name] = float(values.mean(dtype=np.float64)) if values.size else np.nan
        self.history.append(record)
        self.metrics = {}
        self.rows, self.seconds, self.skipped = 0, 0.0, 0


def non_finite(call: Call, bad: int, values: np.ndarray, log: Log) -> str:
    rows = call.batches[bad]
    shown = ", ".join(map(str, rows[:6])) + ", ..." * (len(rows) > 6)
    what = "the loss is" if not np.isfinite(values[bad]) else "a gradient is not finite, with loss"
    before = f" The loss before it was {log.losses[-1]:.6g}." if log.losses.size else ""
    streak = f", after skipping {log.in_a_row - 1} before it" if log.in_a_row > 1 else ""
    return (
        f"{what} {values[bad]} at step {log.step + log.in_a_row - 1} (epoch {call.epoch + 1}, rows "
        f"{shown} of the dataset){streak}.{before} Look at these rows, lower the learning rate, or "
        "clip the gradients (optax.clip_by_global_norm). The state before it is in .state, the "
        "rows are in .rows: jaxgrad.find_nonfinite(loss, error.state.params, batch) names the "
        "operation."
    )
