"""Training as a short loop over jitted calls of many steps.

The loop returns to Python between calls and not between steps, which for a small head is most of
the time. Progress, evaluation, writers and early stopping are callbacks that run between chunks, by
default after each epoch. An exponential average, a schedule or gradient clipping belongs in the
Optax transformation; people with a loop of their own lose nothing, for the parts that it needs are
all public.

What the frozen parameters compute of the loss runs once per row instead of once per step, where
that is predicted to pay (`stage`). The steps are the same steps: same rows, same keys, same loss.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgrad._autograd.loss import differentiable
from jaxgrad._checkpoint.record import Position, Settings, StepRecord
from jaxgrad._checkpoint.run import Checkpoints, Run
from jaxgrad._devices.placement import Placement, Rules, placement
from jaxgrad._devices.processes import of_all
from jaxgrad._devices.progress import progress_bar
from jaxgrad._devices.signals import Interrupted, agreed, caught_signals
from jaxgrad._optim.param_groups import ParamGroups, ParamGroupsState
from jaxgrad._training.history import Log, non_finite
from jaxgrad._training.plan import make_plan
from jaxgrad._training.resident import calls_of, feed, steps_per_call
from jaxgrad._training.resume import (
    position_of,
    refuse_other_settings,
    restore_opt_state,
    restore_params,
)
from jaxgrad._training.state import Callback, NonFiniteLossError, StopTraining, TrainState
from jaxgrad._training.steps import compile_steps
from jaxgrad._training.streamed import is_stream, stream
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.selection import Selection, SelectionError
from jaxgrad._tree.wrt import Wrt

# Steps in a call, at most: a progress bar moves between calls, and a signal is looked at.
_CALL = 256


def fit(
    loss: Callable[..., Any],
    params: PyTree,
    dataset: PyTree,
    tx: optax.GradientTransformation,
    *,
    epochs: int = 1,
    batch_size: int = 256,
    key: jax.Array | None = None,
    wrt: Wrt | None = None,
    every: int | None = None,
    callbacks: Sequence[Callback] = (),
    stage: bool = True,
    skip_nonfinite: int = 0,
    mesh: Mesh | None = None,
    sharding: Rules = "data",
    checkpoint: str | PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainState:
    """Trains the selected parameters on a dataset.

    Args:
        loss: `loss(params, batch)`, pure, to a real scalar, a mean over the rows of the batch. A
            loss with an argument named `key` is passed a PRNG key of its own at each step; one
            whose `key` is bound already, or `None` where `fit` has none, keeps that.
        params: any pytree; it is left as it is.
        dataset: a pytree of arrays with one first axis, the rows. It is put on the device whole;
            with a `mesh`, of one device too, its rows are read when they are needed, and it may be
            larger than the device's memory (`numpy.memmap`). Or anything to iterate over that
            yields batches, as Grain's datasets and loaders do: it says what the rows of a step are
            and in which order they come, an epoch is a pass over it, and of several processes
            each is given its own rows, as many as the others.
        tx: any Optax transformation.
        epochs: how often to go through the rows.
        batch_size: rows a step, where the dataset is arrays. A short last batch is a step too, and
            compiled once.
        key: a typed PRNG key to shuffle the rows with, anew each epoch. Without one they are
            taken in their order.
        wrt: what to train; see `select`. Without it, the groups of `tx` where that comes from
            `param_groups`, else everything. Where `param_groups` is inside of another
            transformation, pass `wrt=groups.assign(params).wrt`.
        every: the number of steps between two calls of the callbacks, which the end of an epoch
            cuts short; by default an epoch.
        callbacks: called with the `TrainState` after each chunk. What they return is added to
            its record in the history; `StopTraining` ends the run.
        stage: compute the frozen part of the loss once, where it is predicted to pay within
            these epochs and its features fit on the device. `TrainState.staging` says what was
            done. The losses are the same to rounding.
        skip_nonfinite: how many steps in a row may have a loss or a gradient that is infinite or
            no number. They change nothing; one more raises.
        mesh: the devices to train on, also those of several processes, which then all call `fit`
            alike, and each its callbacks. The axis named "data", or the first, splits the rows of
            each step, whose order and losses (to rounding) are those of one device.
        sharding: where the parameters and their optimizer state lie on the mesh: "data", whole on
            each device; "fsdp", split along their longest axis that divides; or patterns of paths
            to `PartitionSpec`s, of which the first that matches counts, and what none matches is
            whole on each device.
        checkpoint: the directory to save the run in after each chunk, or `Checkpoints`. SIGINT and
            SIGTERM then finish the step, save and raise `Interrupted`; a second one kills at once.
        resume: go on from the newest whole step in `checkpoint`, to the bit as if the run had not
            ended; begin where there is none. All parameters are those of the run. Under another
            `wrt` or `tx`, the state of the optimizer is kept where it fits.
        progress: show a bar, on a terminal.

    Returns:
        The final `TrainState`.

    Raises:
        NonFiniteLossError: a loss or a gradient is infinite or no number.
        CheckpointError: `checkpoint` holds a run and `resume` is not asked for; the run does not
            fit the parameters, or had other rows, batches or another key; or it can't be saved.
        Interrupted: a signal came, and the run is saved.
        SelectionError: see `select` and `param_groups`; or `tx` has `param_groups` inside, and
            there is no `wrt`.
        GradientError: see `value_and_grad`.
        ValueError: the arrays of the dataset differ in their rows, a number is out of its range,
            the loss needs a key and there is none, `sharding` or `batch_size` does not fit the
            mesh, or there is a `checkpoint` and an iterator that can't say how far it has come.

    Example:
        >>> import jax.numpy as jnp, optax, jaxgrad as jg
        >>> def loss(params, batch):
        ...     return jnp.mean((batch["x"] * params["slope"] + params["offset"] - batch["y"]) ** 2)
        >>> x = jnp.linspace(-1.0, 1.0, 10)
        >>> start = {"slope": jnp.array(0.0), "offset": jnp.array(1.0)}
        >>> tx = jg.param_groups({"slope": optax.sgd(0.5)})
        >>> state = jg.fit(loss, start, {"x": x, "y": 3 * x + 1}, tx, epochs=20, batch_size=4)
        >>> print(round(float(state.params["slope"]), 3), state.params["offset"], state.step)
        3.0 1.0 60

    Source: the training loop of the PyTorch tutorials, and Keras's `fit`.
    """
    for name, value, least in (
        ("epochs", epochs, 0),
        ("batch_size", batch_size, 1),
        ("every", every, 1),
        ("skip_nonfinite", skip_nonfinite, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}; it must be {least} or more.")
    streams = is_stream(dataset)
    rows, batch_size = (0, 0) if streams else (rows_of(dataset), batch_size)
    place = placement(mesh, sharding, params, batch_size)
    selection = differentiable(params, _wrt_of(tx, params) if wrt is None else wrt)
    noise = place.put(key) if _takes_key(loss, key) else None
    extra = {} if noise is None else {"key": noise}
    settings = Settings(rows, batch_size, _key_text(key))

    with contextlib.ExitStack() as stack:
        run = _open(checkpoint, resume, place, stack)
        signals = stack.enter_context(caught_signals(run is not None))
        begun, was_staged, position = _begin(run, params, selection, tx, place, settings)
        done, resumed = begun.step, begun.resumed
        trainable, rest = selection.split(begun.params)
        if run:
            run.keep_frozen(rest)
        ask = was_staged if stage and not streams else False
        plan = make_plan(
            loss, begun.params, selection, dataset, batch_size, extra, epochs, ask, progress, place
        )
        log = Log(done, begun.losses, [*begun.history], position)
        # A call takes over the buffers it is given, and these are the caller's. Some optimizers
        # keep the parameters themselves in their state: a copy for each place.
        carry = _copied(place.put((trainable, begun.opt_state, jnp.int32(0))))
        del params, begun, trainable  # what is trained is there once, but for the caller's own
        pinned = place.pinned(carry)
        take_steps = compile_steps(plan.objective, bool(extra), tx, skip_nonfinite, pinned)
        if streams:
            calls = stream(place, dataset, epochs, every, _CALL, position, run is not None)
        else:
            most = steps_per_call(place, plan.data, batch_size, _CALL)
            rows_to_take = calls_of(rows, batch_size, epochs, every, most, key, done)
            calls = feed(place, plan.data, rows_to_take)

        def state(carry: Any) -> TrainState:
            history = tuple(map(dict, log.history))
            params = merge(carry[0], rest)
            return TrainState(params, carry[1], log.step, log.losses, history, plan.line, resumed)

        def save() -> None:
            if run:
                tree = {"trained": carry[0], "opt_state": carry[1], "losses": log.losses}
                record = StepRecord(
                    step=log.step,
                    trained=tuple(selection.paths),
                    staged=plan.staged,
                    settings=settings,
                    positions=tuple(Position(*position) for position in of_all(log.position)),
                )
                run.save(_copied(tree), record, log.history)

        advance = stack.enter_context(
            progress_bar(epochs * rows or None, "compiling", progress, done=done * batch_size)
        )
        start = time.perf_counter()
        with contextlib.suppress(StopTraining):
            for call, data, batches in calls:
                carry, values, finite = take_steps(
                    carry, plan.held, data, batches, call.steps, noise, log.step
                )
                lost = log.add(call, np.asarray(values), np.asarray(finite), skip_nonfinite)
                log.seconds += time.perf_counter() - start
                if lost is not None:
                    save()
                    message = non_finite(call, lost, values, log)
                    raise NonFiniteLossError(message, state(carry), call.batches[lost])
                advance(call.rows, f"epoch {call.epoch + 1}  {log.line}")
                if call.ends_chunk:
                    log.close_chunk(call.epoch)
                    for callback in callbacks:
                        log.history[-1] |= callback(state(_copied(carry))) or {}
                stop = agreed(signals) if run else None
                if stop or (run and call.ends_chunk and run.is_due(len(log.history))):
                    save()
                if stop:
                    raise _interrupted(run, stop, state(carry))
                start = time.perf_counter()  # the wait for rows counts, callbacks and saves don't
        save()
    return state(carry)


def _open(
    checkpoint: str | PathLike[str] | Checkpoints | None,
    resume: bool,
    place: Placement,
    stack: contextlib.ExitStack,
) -> Run | None:
    if checkpoint is None:
        if resume:
            raise ValueError(
                "resume=True needs the directory of the run: fit(..., checkpoint=...)."
            )
        return None
    config = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
    return stack.enter_context(Run(config, resume, place.sharding_of))


def _begin(
    run: Run | None,
    params: PyTree,
    selection: Selection,
    tx: optax.GradientTransformation,
    place: Placement,
    settings: Settings,
) -> tuple[TrainState, bool | None, Position]:
    """The state before the next step, whether the run was staged, how far it had read a stream."""
    params = place.put(params)
    saved = run.newest() if run else None
    if run is None or saved is None:
        trainable, _ = selection.split(params)
        opt_state = place.init(tx, trainable)
        begun = TrainState(params, opt_state, 0, np.zeros(0, np.float32), (), "")
        return begun, None, Position()
    where = str(run.root)
    refuse_other_settings(saved, settings, where)
    params = place.put(restore_params(saved, params, where))
    trainable, _ = selection.split(params)
    opt_state, line = restore_opt_state(saved, place.init(tx, trainable), trainable)
    # With other leaves frozen, whether to stage is a new question.
    record = saved.record
    staged = record.staged if tuple(selection.paths) == record.trained else None
    begun = TrainState(params, opt_state, record.step, saved.losses, record.entries, "", line)
    return begun, staged, position_of(saved, where)


def _wrt_of(tx: optax.GradientTransformation, params: PyTree) -> Wrt:
    """What a transformation trains, where nothing else says so."""
    if isinstance(tx, ParamGroups):
        return tx.assign(params).wrt
    state = jax.eval_shape(tx.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ParamGroupsState))
    if any(isinstance(node, ParamGroupsState) for node in nodes):
        raise SelectionError(
            "tx has param_groups inside of another transformation, which would see the gradients "
            "of what the groups freeze. Pass what they train: "
            "fit(..., wrt=groups.assign(params).wrt)."
        )
    return "**"


def _takes_key(loss: Callable[..., Any], key: jax.Array | None) -> bool:
    parameter = inspect.signature(loss).parameters.get("key")
    if parameter is None:
        return False
    needed = parameter.default is inspect.Parameter.empty
    if needed and key is None:
        raise ValueError("the loss takes a key, and fit was given none: fit(..., key=...).")
    return key is not None and (needed or parameter.default is None)


def _key_text(key: jax.Array | None) -> str | None:
    if key is None:
        return None
    return f"{jax.random.key_impl(key)} {jax.random.key_data(key).tolist()}"


def _copied(tree: PyTree) -> PyTree:
    # `jnp.copy` would be compiled for each shape.
    def copy(x: Any) -> Any:
        return jax.device_put(x, x.sharding, may_alias=False) if isinstance(x, jax.Array) else x

    return jax.tree.map(copy, tree)


def _interrupted(run: Run | None, signal: Any, state: TrainState) -> Interrupted:
    where = f" It is saved in '{run.root}': continue it with resume=True." if run else ""
    return Interrupted(f"{signal.name} ended the run at step {state.step}.{where}", state, signal)
