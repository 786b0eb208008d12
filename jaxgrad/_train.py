"""Training as a short loop over jitted chunks.

A chunk is one `lax.scan` over steps, by default an epoch: the loop returns to Python between
chunks and not between steps, which for a small head is most of the time. Progress, evaluation,
checkpoints and early stopping are callbacks that run there. An exponential average, a schedule
or gradient clipping belongs in the Optax transformation; people with a loop of their own lose
nothing, for the parts that it needs are all public.

What the frozen parameters compute of the loss runs once per row instead of once per step, where
that is predicted to pay (`stage`). The steps are the same steps: same rows, same keys, same loss.
"""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._autograd import split_for_grad, value_and_grad
from jaxgrad._messages import count, size
from jaxgrad._optim import ParamGroups, ParamGroupsState, apply_updates
from jaxgrad._prepare import place_for
from jaxgrad._select import (
    PyTree,
    SelectionError,
    Wrt,
    flatten,
    halves,
    is_array,
    is_hole,
    merge,
    partition,
    select,
)
from jaxgrad._stage import Staged, StageError
from jaxgrad._stage import stage as stage_loss

Callback: TypeAlias = Callable[["TrainState"], Mapping[str, float] | None]


class NonFiniteLossError(ArithmeticError):
    """A loss that is infinite or no number; the message names the step and the rows."""

    __module__ = "jaxgrad"


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
        history: a record for each chunk: `step`, `epoch`, the mean `loss`, `rows_per_s`, and
            what the callbacks returned.
        staging: one line: what of the loss runs once and what it gains, or why nothing does.
    """

    params: PyTree
    opt_state: Any
    step: int
    losses: np.ndarray
    history: tuple[dict[str, float], ...]
    staging: str


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
    progress: bool = True,
) -> TrainState:
    """Trains the selected parameters on a dataset.

    Args:
        loss: `loss(params, batch)`, pure, to a real scalar, a mean over the rows of the batch. A
            loss with an argument named `key` is passed a PRNG key of its own at each step; one
            whose `key` is bound already, or `None` where `fit` has none, keeps that.
        params: any pytree; it is left as it is.
        dataset: a pytree of arrays with one first axis, the rows. It is put on the device whole.
        tx: any Optax transformation.
        epochs: how often to go through the rows.
        batch_size: rows a step. A short last batch is a step too, and compiled once.
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
        progress: show a bar, on a terminal.

    Returns:
        The final `TrainState`.

    Raises:
        NonFiniteLossError: a loss is infinite or no number.
        SelectionError: see `select` and `param_groups`; or `tx` has `param_groups` inside, and
            there is no `wrt`.
        GradientError: see `value_and_grad`.
        ValueError: the arrays of the dataset differ in their rows, a number is out of its range,
            or the loss needs a key and there is none.

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
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}; it must be {least} or more.")
    rows = _rows(dataset)
    if wrt is None:
        wrt = _wrt_of(tx, params)
    params = jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, params)
    trainable, rest = split_for_grad(params, wrt)
    takes_key = _takes_key(loss, key)
    shuffle, noise = (None, None) if key is None else jax.random.split(key)
    extra = {"key": noise} if takes_key else {}
    plan = _unstaged(loss, params, wrt, dataset)
    if stage and epochs and jax.tree.leaves(plan.held):
        batch = _abstract(dataset, min(batch_size, rows))
        jax.eval_shape(plan.objective, trainable, plan.held, batch, **extra)  # for its errors
        plan = _staged(plan, loss, params, wrt, dataset, batch, extra, epochs, progress)
    run = _compile(plan.objective, takes_key, tx)

    # The first chunk takes over the buffers it is given, and these are the caller's.
    # Some optimizers keep the parameters themselves in their state: a copy for each place.
    carry = jax.tree.map(jnp.copy, (trainable, tx.init(trainable)))
    data = jax.tree.map(jnp.asarray, plan.data)
    losses: list[np.ndarray] = []
    history: list[dict[str, float]] = []
    step = 0

    def state(keep: bool) -> TrainState:
        trainable, opt_state = jax.tree.map(jnp.copy, carry) if keep else carry
        done = np.concatenate(losses) if losses else np.zeros(0, np.float32)
        return TrainState(merge(trainable, rest), opt_state, step, done, tuple(history), plan.line)

    with _bar(epochs * rows, progress) as advance, contextlib.suppress(StopTraining):
        for epoch in range(epochs):
            order = np.arange(rows) if shuffle is None else _shuffled(shuffle, epoch, rows)
            for chunk in _chunks(order, batch_size, every):
                start = time.perf_counter()
                for batches in chunk:
                    carry, values = run(carry, plan.held, data, batches, noise, step)
                    losses.append(np.asarray(values))
                    _refuse_non_finite(losses[-1], step, epoch, batches)
                    step += len(batches)
                taken = sum(batches.size for batches in chunk)
                rate = taken / (time.perf_counter() - start)
                mean = float(np.concatenate(losses[-len(chunk) :]).mean())
                history.append({"step": step, "epoch": epoch, "loss": mean, "rows_per_s": rate})
                advance(taken, f"epoch {epoch + 1}  loss {mean:.4f}  {rate:,.0f} rows/s")
                for callback in callbacks:
                    history[-1] |= callback(state(keep=True)) or {}
    return state(keep=False)


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


class _Plan(NamedTuple):
    """How a step gets its loss and gradients: `objective(trainable, held, batch, **extra)`."""

    objective: Callable[..., tuple[jax.Array, PyTree]]
    held: PyTree  # what the objective needs beside the trainable half
    data: PyTree  # batches of which it takes
    line: str


def _unstaged(loss: Callable[..., Any], params: PyTree, wrt: Wrt, dataset: PyTree) -> _Plan:
    flat = flatten(partition(params, wrt)[1])
    frozen, static = halves(flat, [is_array(leaf) for leaf in flat.leaves])
    differentiate = value_and_grad(loss, wrt=select(params, wrt))

    def objective(trainable: PyTree, frozen: PyTree, batch: PyTree, **extra: Any) -> Any:
        return differentiate(merge(trainable, frozen, static), batch, **extra)

    return _Plan(objective, frozen, dataset, "nothing is staged")


def _staged(
    unstaged: _Plan,
    loss: Callable[..., Any],
    params: PyTree,
    wrt: Wrt,
    dataset: PyTree,
    batch: PyTree,
    extra: Mapping[str, Any],
    epochs: int,
    progress: bool,
) -> _Plan:
    """The plan with the frozen part run once, where that pays; else the one that there is."""

    def positional(params: PyTree, batch: PyTree, *vary: Any) -> Any:
        return loss(params, batch, **dict(zip(extra, vary, strict=True)))

    def objective(trainable: PyTree, staged: Staged, features: PyTree, **extra: Any) -> Any:
        of_trainable = value_and_grad(lambda t: staged.loss(t, features, *extra.values()))
        return of_trainable(trainable)

    try:
        staged = stage_loss(positional, params, batch, wrt, vary=tuple(extra.values()))
        report, rows = staged.report(), _rows(dataset)
        gain, need = report.gain(rows, epochs), rows * report.nbytes
        if not report.staged:
            why = str(report.refusals[0][0]) if report.refusals else "no frozen part takes long"
        elif gain <= 1:
            passes = count(range(epochs), "epoch", verb=False)
            why = f"{passes} of {rows:,} rows would not gain by it"
        elif place_for("auto", need, None) != "device":
            why = f"the features take {size(need)}, more than there is room for"
        else:
            features = staged.prepare(dataset, "device", progress=progress)
            line = f"the frozen part runs once per row ({size(need)} of features): "
            line += f"predicted {gain:.2g} times as fast, preparation included"
            return _Plan(objective, staged, features, line)
    except StageError as e:
        why = str(e)
    return unstaged._replace(line=f"nothing is staged: {why}")


def _compile(
    objective: Callable[..., Any], takes_key: bool, tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, jax.Array]]:
    """The jitted chunk; it compiles once for each number of steps and rows in them."""

    def run(
        carry: Any, held: PyTree, data: PyTree, chunk: jax.Array, key: Any, first: jax.Array
    ) -> tuple[Any, jax.Array]:
        def step(carry: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            trainable, opt_state = carry
            rows, i = at
            batch = jax.tree.map(lambda x: x[rows], data)
            extra = {"key": jax.random.fold_in(key, i)} if takes_key else {}
            value, grads = objective(trainable, held, batch, **extra)
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return (apply_updates(trainable, updates), opt_state), value

        return jax.lax.scan(step, carry, (chunk, first + jnp.arange(len(chunk))))

    return jax.jit(run, donate_argnums=0)


def _abstract(dataset: PyTree, rows: int) -> PyTree:
    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(
            x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        )
        return jax.ShapeDtypeStruct((rows, *np.shape(x)[1:]), dtype)

    return jax.tree.map(leaf, dataset)


def _rows(dataset: PyTree) -> int:
    flat = flatten(dataset)
    sizes = {
        path: np.shape(leaf)[0] if np.ndim(leaf) else 0
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not is_hole(leaf)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        found = ", ".join(f"'{path}' {n}" for path, n in sizes.items()) or "no array"
        raise ValueError(
            f"the arrays of a dataset share their first axis, its rows; this one has {found}."
        )
    return next(iter(sizes.values()))


def _shuffled(key: jax.Array, epoch: int, rows: int) -> np.ndarray:
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), rows))


def _chunks(order: np.ndarray, batch_size: int, every: int | None) -> Iterator[list[np.ndarray]]:
    """Rows of the steps of each chunk, `[steps, batch]`, and apart those of a short last batch."""
    whole = len(order) // batch_size * batch_size
    full, short = order[:whole].reshape(-1, batch_size), order[None, whole:]
    steps = len(full) + (short.size > 0)
    every = every or steps
    for start in range(0, steps, every):
        parts = (full[start : start + every], short if start + every >= steps else short[:, :0])
        yield [part for part in parts if part.size]


def _refuse_non_finite(values: np.ndarray, step: int, epoch: int, chunk: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return
    first = int(bad[0])
    shown = ", ".join(map(str, chunk[first][:6])) + ", ..." * (chunk.shape[1] > 6)
    before = f" The loss before it was {values[first - 1]:.6g}." if first else ""
    raise NonFiniteLossError(
        f"the loss is {values[first]} at step {step + first} (epoch {epoch + 1}, rows {shown} of "
        f"the dataset).{before} Look at these rows, lower the learning rate, or clip the "
        "gradients (optax.clip_by_global_norm)."
    )


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield lambda rows, text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda rows, text: bar.update(task, advance=rows, description=text)
