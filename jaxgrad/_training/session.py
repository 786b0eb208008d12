"""A session: a run in progress, from the first call of its jitted steps to the last.

It owns all that changes while `fit` runs: the carry of the jitted steps, whose buffers each call
takes over, and the log.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._checkpoint.record import Position, StepRecord
from jaxgrad._checkpoint.run import Run
from jaxgrad._devices.processes import of_all
from jaxgrad._optim.parts import parts_of
from jaxgrad._training.calls import Call
from jaxgrad._training.history import Log, non_finite
from jaxgrad._training.job import Job
from jaxgrad._training.plan import make_plan
from jaxgrad._training.resident import calls_of, feed, steps_per_call
from jaxgrad._training.resume import (
    position_of,
    refuse_other_settings,
    restore_params,
    restore_stats,
)
from jaxgrad._training.resume_optimizer import restore_opt_state
from jaxgrad._training.state import Callback, NonFiniteLossError, TrainState
from jaxgrad._training.steps import Carry, compile_steps
from jaxgrad._training.streamed import stream
from jaxgrad._tree.flat import PyTree, is_array
from jaxgrad._tree.merge import merge
from jaxgrad._tree.types import Batch, Params

# Steps in a call, at most: a progress bar moves between calls, and a signal is looked at.
_CALL = 256


class Session:
    """A run in progress, new or resumed.

    Args:
        job: the call of `fit`.
        params: all parameters as they were given; a run that is resumed has its own.
        run: where the run is saved, if it is.

    Raises:
        CheckpointError: the run on disk does not fit the parameters or the rows of the job.
        StageError: see `make_plan`.
    """

    def __init__(self, job: Job, params: Params, run: Run | None) -> None:
        begun, was_staged, self.log = _begin(job, params, run)
        trainable, self.rest = job.selection.split(begun.params)
        if run:
            run.keep_frozen(jax.tree.map(lambda x: x if is_array(x) else None, self.rest))
        self.job, self.run, self.resumed = job, run, begun.resumed
        self.plan = make_plan(job, begun.params, begun.stats, was_staged)
        # A call takes over the buffers it is given, and these are the caller's. Some optimizers
        # keep the parameters themselves in their state: a copy for each place.
        self.carry = _copied(
            job.place.put(Carry(trainable, begun.opt_state, begun.stats, jnp.int32(0)))
        )
        self._take_steps = compile_steps(
            self.plan.objective,
            job.tx,
            job.max_nonfinite_steps,
            job.place.pinned(self.carry),
        )

    def calls(self) -> Generator[Call]:
        """Runs the calls one by one, and yields each when it has run.

        Raises:
            NonFiniteLossError: a step of the call was one too many that is not finite.
        """
        key = self.job.given.get("key")
        start = time.perf_counter()
        for call, data, batches in self._feed():
            span = self.log.step, call.steps
            self.carry, taken = self._take_steps(
                self.carry, self.plan.held, data, batches, key, span
            )
            taken = jax.tree.map(np.asarray, taken)
            lost = self.log.add(call, taken, self.job.max_nonfinite_steps)
            self.log.seconds += time.perf_counter() - start
            if lost is not None:
                self.save()
                message = non_finite(call, lost, taken.losses, self.log)
                raise NonFiniteLossError(message, self.state(), call.batches[lost])
            yield call
            start = time.perf_counter()  # the wait for rows counts, callbacks and saves do not

    def record(self, epoch: int, callbacks: Sequence[Callback]) -> None:
        """Adds the entry of a chunk to the history, with what the callbacks return."""
        self.log.close_chunk(epoch)
        for callback in callbacks:
            self.log.history[-1] |= callback(self.state(copy=True)) or {}

    def save(self) -> None:
        """Saves the run, if it is saved at all."""
        if not self.run:
            return
        tree = {
            "trained": self.carry.trainable,
            "opt_state": self.carry.opt_state,
            "stats": self.carry.stats,
            "losses": self.log.losses,
            "metrics": self.log.metrics,
        }
        record = StepRecord(
            step=self.log.step,
            trained=tuple(self.job.selection.paths),
            parts=parts_of(self.carry.opt_state, self.carry.trainable),
            staged=self.plan.staged,
            settings=self.job.settings,
            positions=tuple(Position(*position) for position in of_all(self.log.position)),
        )
        self.run.save(_copied(tree), record, self.log.history)

    def save_if_due(self, must: bool = False) -> None:
        """Saves the run at the end of a chunk, as often as its `Checkpoints` say, or if it must."""
        if self.run and (must or self.run.is_due(len(self.log.history))):
            self.save()

    def state(self, *, copy: bool = False) -> TrainState:
        """The state after the last call. The next call takes over its buffers, unless `copy`."""
        carry = _copied(self.carry) if copy else self.carry
        return TrainState(
            params=merge(carry.trainable, self.rest),
            opt_state=carry.opt_state,
            step=self.log.step,
            losses=self.log.losses,
            history=tuple(map(dict, self.log.history)),
            staging=self.plan.line,
            resumed=self.resumed,
            stats=carry.stats,
        )

    def _feed(self) -> Iterator[tuple[Call, Batch, np.ndarray]]:
        job, log = self.job, self.log
        if job.streams:
            return stream(job, _CALL, log.position, resumable=self.run is not None)
        most = steps_per_call(job.place, self.plan.data, job.batch_size, _CALL)
        return feed(job.place, self.plan.data, calls_of(job, most, log.step))


def _begin(job: Job, params: Params, run: Run | None) -> tuple[TrainState, bool | None, Log]:
    """The state before the next step, whether the run was staged, and the log up to here."""
    place, selection = job.place, job.selection
    params, stats = place.put(params), job.given.get("stats")
    saved = run.newest() if run else None
    if run is None or saved is None:
        trainable, _ = selection.split(params)
        opt_state = place.init(job.tx, trainable)
        log = Log(0, np.zeros(0, np.float32), [], Position())
        return TrainState(params, opt_state, 0, log.losses, (), "", stats=stats), None, log
    where, record = str(run.root), saved.record
    refuse_other_settings(saved, job.settings, where)
    params = place.put(restore_params(saved, params, where))
    trainable, _ = selection.split(params)
    opt_state, line = restore_opt_state(saved, place.init(job.tx, trainable), trainable)
    stats = place.put(restore_stats(saved, stats, where))
    # With other leaves frozen, whether to stage is a new question.
    staged = record.staged if tuple(selection.paths) == record.trained else None
    log = Log(record.step, saved.losses, [*record.entries], position_of(saved, where))
    log.metrics = saved.metrics if job.has_aux else {}
    begun = TrainState(params, opt_state, record.step, saved.losses, (), "", line, stats)
    return begun, staged, log


def _copied(tree: PyTree) -> PyTree:
    # `jnp.copy` would be compiled for each shape.
    def copy(x: Any) -> Any:
        return jax.device_put(x, x.sharding, may_alias=False) if isinstance(x, jax.Array) else x

    return jax.tree.map(copy, tree)
