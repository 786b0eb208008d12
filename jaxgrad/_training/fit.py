"""Training as a short loop over jitted calls of many steps.

The loop returns to Python between calls and not between steps, which for a small head is most of
the time. Progress, evaluation, writers and early stopping are callbacks that run between chunks, by
default after each epoch. An exponential average, a schedule or gradient clipping belongs in the
Optax transformation; a loop of one's own loses nothing, since every part that it needs is public.

What the frozen parameters compute of the loss runs once per row instead of once per step if that is
predicted to pay (`stage`). The steps are the same steps: same rows, same keys, same loss.
"""

import contextlib
import signal
from collections.abc import Sequence
from os import PathLike

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxgrad._autograd.loss import differentiable
from jaxgrad._checkpoint.run import Checkpoints, Run
from jaxgrad._devices.placement import Placement, Rules, placement
from jaxgrad._devices.progress import progress_bar
from jaxgrad._devices.signals import Interrupted, agreed, caught_signals
from jaxgrad._optim.holes import refusing_holes
from jaxgrad._optim.param_groups import ParamGroups, holds_groups
from jaxgrad._training.accumulation import check_batches, check_rest
from jaxgrad._training.best import Best, best_of
from jaxgrad._training.job import Job, Stage
from jaxgrad._training.session import Session
from jaxgrad._training.state import Callback, StopTraining, TrainState
from jaxgrad._tree.flat import PyTree, flatten, halves, is_array, is_number
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.types import Batch, Loss, Params
from jaxgrad._tree.wrt import Wrt


def fit(
    loss: Loss,
    params: Params,
    dataset: Batch,
    tx: optax.GradientTransformation,
    *,
    wrt: Wrt | None = None,
    epochs: int = 1,
    batch_size: int = 256,
    key: jax.Array | None = None,
    stats: PyTree = None,
    has_aux: bool = False,
    stage: Stage = "auto",
    callbacks: Sequence[Callback] = (),
    callback_every: int | None = None,
    checkpoint: str | PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
    max_nonfinite_steps: int = 0,
    mesh: Mesh | None = None,
    sharding: Rules = "replicated",
    progress: bool = True,
) -> TrainState:
    """Trains the selected parameters on a dataset.

    Args:
        loss: `loss(params, batch)`, pure, to a real scalar, a mean over the rows of the batch. If
            it has an argument `key`, each step passes it a PRNG key of its own; if it has an
            argument `stats`, each step passes it the statistics, and it returns `(value,
            new_stats)`. Either argument keeps a default other than `None`, and keeps `None` if
            `fit` was given nothing for it.
        params: any pytree; it is not changed.
        dataset: a pytree of arrays with the rows along axis 0. It is put on the device at once;
            with a `mesh`, even of one device, rows are read as they are needed, and the dataset
            may be larger than the device's memory (`numpy.memmap`). Or an iterable of batches, such
            as Grain's datasets and loaders: it decides which rows a step has and in which order,
            an epoch is one pass over it, and each of several processes reads its own rows, the
            same number as the others.
        tx: any Optax transformation. One that takes extra arguments is passed `value`, `grad` and
            `value_fn`, the loss of this batch as a function of what is trained.
            A warning reports gradients that `optax.MultiSteps` accumulated and never applied, and
            a short batch that it counts as a full one.
        wrt: what to train; see `select`. By default the groups of `tx` if `param_groups` made it,
            else everything. If `param_groups` is inside another transformation, pass
            `wrt=groups.assign(params).wrt`.
        epochs: the number of passes over the rows.
        batch_size: the rows of a step, if the dataset is arrays. A short last batch is a step too,
            and is compiled once.
        key: a typed PRNG key that shuffles the rows, differently in each epoch. Without one, rows
            are taken in order.
        stats: the statistics of the model at the start, as `apply.stats` of `functional`.
        has_aux: whether the loss returns metrics too, `(value, metrics)`, or with `stats`
            `(value, (new_stats, metrics))`: a dict of scalars. The history has the mean of each
            over the steps of a chunk.
        stage: whether to compute the frozen part of the loss once per row instead of once per step.
            "auto" does so if it is predicted to pay within these epochs and the features fit in
            memory; `True` does so, or raises `StageError` with the reason it can't; `False` does
            not. `TrainState.staging` reports what was done. Losses are the same up to rounding.
        callbacks: called with the `TrainState` after each chunk of steps. The numbers that they
            return are added to the chunk's entry in the history; `StopTraining` ends the run.
        callback_every: the number of steps in a chunk, which the end of an epoch cuts short; by
            default an epoch.
        checkpoint: the directory to save the run in after each chunk, or `Checkpoints`. SIGINT and
            SIGTERM then finish the step, save and raise `Interrupted`; a second one kills at once.
        resume: continue from the newest complete step in `checkpoint`, bit for bit as if the run
            had not ended; start anew if there is none. All parameters are those of the run. Under
            another `wrt` or `tx`, moments, averages and counters follow their leaves, and
            `TrainState.resumed` says what can't be kept.
        max_nonfinite_steps: how many consecutive steps may have a loss or gradient that is infinite
            or NaN. They change nothing; one more raises.
        mesh: the devices to train on, also those of several processes, which then all call `fit`
            alike, each with its own callbacks. The axis named "data", or the first, splits the rows
            of each step; their order and (up to rounding) the losses are those of one device.
        sharding: where parameters and optimizer state are on the mesh: "replicated", a full copy
            on each device; "fsdp", split along their longest axis that divides; or a mapping from
            patterns of paths to `PartitionSpec`s. The first pattern that matches counts; what
            none matches is replicated.
        progress: show a bar, on a terminal or in a notebook.

    Returns:
        The final `TrainState`.

    Raises:
        NonFiniteLossError: a loss or a gradient is infinite or NaN.
        CheckpointError: `checkpoint` holds a run and `resume` is False; the run does not fit the
            parameters, or had other data, batches or another key; or it can't be saved.
        Interrupted: a signal came, and the run is saved.
        SelectionError: see `select` and `param_groups`; or `tx` has `param_groups` inside, and
            there is no `wrt`.
        StageError: `stage=True`, and the loss can't be staged.
        UpdateError: `tx` can't take a tree with holes.
        GradientError: see `value_and_grad`; or the loss returns something else than `stats` and
            `has_aux` ask for, or trains a layer whose new statistics it drops.
        RowsError: the arrays of the dataset differ in their rows, or there are none.
        ValueError: a number is out of range; the loss needs a key or statistics and there are
            none, or there are statistics and it takes none; `sharding` or `batch_size` does not
            fit the mesh; or there is a `checkpoint` and an iterator that can't report its position.

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
    selection = differentiable(params, _wrt_of(tx, params) if wrt is None else wrt)
    params = selection.map(lambda x: jnp.asarray(x) if is_number(x) else x, params)
    job = Job(
        loss=loss,
        dataset=dataset,
        tx=tx,
        selection=selection,
        place=placement(mesh, sharding, params),
        epochs=epochs,
        batch_size=batch_size,
        key=key,
        stats=stats,
        has_aux=has_aux,
        stage=stage,
        callback_every=callback_every,
        max_nonfinite_steps=max_nonfinite_steps,
        progress=progress,
    )
    best = best_of(callbacks)
    with contextlib.ExitStack() as stack:
        half = flatten(halves(job.selection.flat, job.selection.flags)[0])
        stack.enter_context(refusing_holes(tx, half, "tx"))
        accumulation, sizes = check_batches(job, params), set[int]()
        run = _open(checkpoint, resume, best, job.place, stack)
        signals = stack.enter_context(caught_signals(run is not None))
        session = Session(job, params, run)
        if best and run:
            best.resume(session.state(copy=True), job.selection.paths, run)
        del params  # one copy of the trained leaves, beside the caller's own
        done = session.log.step * batch_size
        advance = stack.enter_context(
            progress_bar(epochs * job.rows or None, "compiling", progress, done=done)
        )
        with contextlib.suppress(StopTraining), contextlib.closing(session.calls()) as calls:
            for call in calls:
                sizes.add(call.rows // call.steps)
                advance(call.rows, f"epoch {call.epoch + 1}  {session.log.line}")
                if call.ends_chunk:
                    session.record(call.epoch, [*callbacks, *filter(None, [best])])
                if run and (stop := agreed(signals)):
                    session.save()
                    raise _interrupted(run, stop, session.state())
                if call.ends_chunk:
                    session.save_if_due(best is not None and best.is_kept(session.log.step))
        session.save()
    state = session.state()
    check_rest(accumulation, state.opt_state, sizes)
    return best.restored(state) if best else state


def _open(
    checkpoint: str | PathLike[str] | Checkpoints | None,
    resume: bool,
    best: Best | None,
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
    config = best.checkpoints(config) if best else config
    return stack.enter_context(Run(config, resume, place.sharding_of))


def _wrt_of(tx: optax.GradientTransformation, params: Params) -> Wrt:
    """What a transformation trains if there is no `wrt`."""
    if isinstance(tx, ParamGroups):
        return tx.assign(params).wrt
    arrays = jax.tree.map(lambda x: x if is_array(x) else None, params)
    if holds_groups(jax.eval_shape(tx.init, arrays)):
        raise SelectionError(
            "tx has param_groups inside another transformation, which would read the gradients "
            "of what the groups freeze. Pass what they train: "
            "fit(..., wrt=groups.assign(params).wrt)."
        )
    return "**"


def _interrupted(run: Run, stop: signal.Signals, state: TrainState) -> Interrupted:
    return Interrupted(
        f"{stop.name} ended the run at step {state.step}. It is saved in '{run.root}': continue it "
        "with resume=True.",
        state,
        stop,
    )
