"""Callbacks of `fit`, called between chunks: evaluation, early stopping, writers.

A callback is a function of the `TrainState` that returns additions to the record of the chunk. The
callbacks here keep no state: they read `state.history`, which a resumed run restores, so they
continue as if the run had not ended. They run in the order given, and each sees what earlier ones
added.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxgrad._devices.processes import is_first
from jaxgrad._disk.atomic import replacing
from jaxgrad._training.best import RestoreBest
from jaxgrad._training.evaluate import evaluator, means
from jaxgrad._training.state import Callback, StopTraining, TrainState
from jaxgrad._tree.types import Batch

__all__ = ["early_stopping", "evaluate", "plot_history", "write_jsonl", "write_tensorboard"]


def evaluate(
    metrics: Callable[..., Mapping[str, Any]],
    dataset: Batch,
    *,
    batch_size: int = 256,
    prefix: str = "test_",
) -> Callback:
    """Returns a callback that evaluates the model on a dataset, as `jaxgrad.evaluate` does.

    Args:
        metrics: `metrics(params, batch)`, pure, to a dict of scalars, each a mean over the rows of
            the batch, or of pairs `(total, weight)`. If it has an argument `stats`, it is passed
            the statistics of the run.
        dataset: what `fit` takes: a pytree of arrays with the rows along axis 0, or an iterable
            of batches. It is passed over after each chunk.
        batch_size: the rows of a batch, if the dataset is arrays.
        prefix: prepended to the names in the record.

    Returns:
        A callback that adds the metrics of the complete dataset to the record. `metrics` is
        compiled once for each number of rows in a batch.

    Raises:
        RowsError: the arrays of the dataset differ in their rows, or there are none.
        ValueError: `batch_size` is below 1, or the dataset is used up by one pass; during
            training, what `jaxgrad.evaluate` raises.

    Example:
        >>> import jax.numpy as jnp, optax, jaxgrad as jg
        >>> loss = lambda p, batch: jnp.mean((p * batch["x"] - batch["y"]) ** 2)
        >>> x = jnp.arange(8.0)
        >>> test = jg.callbacks.evaluate(lambda p, b: {"loss": loss(p, b)}, {"x": x, "y": 3 * x})
        >>> data = {"x": x[:4], "y": 3 * x[:4]}
        >>> state = jg.fit(loss, jnp.array(0.0), data, optax.sgd(0.1), epochs=9, callbacks=[test])
        >>> round(state.history[0]["test_loss"], 2), round(state.history[-1]["test_loss"], 2)
        (14.17, 0.0)

    Source: the test loop of the PyTorch tutorials, under `torch.no_grad()`.
    """
    run = evaluator(metrics, dataset, batch_size, "callbacks.evaluate")
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"callbacks.evaluate passes over the dataset after each chunk, and one pass uses up "
            f"this {type(dataset).__name__}. Pass what can be iterated over again."
        )

    def callback(state: TrainState) -> dict[str, float]:
        found = means(run(state.params, state.stats))
        return {prefix + name: value for name, value in found.items()}

    return callback


def early_stopping(
    metric: str,
    *,
    patience: int,
    mode: Literal["min", "max"] = "min",
    min_delta: float = 0.0,
    restore_best: bool = False,
) -> Callback:
    """Returns a callback that ends the run when a metric stops improving.

    Args:
        metric: a name in the records of the history: `loss`, or what an earlier callback adds.
        patience: how many chunks without improvement to tolerate; one more ends the run.
        mode: whether lower ("min") or higher ("max") is better.
        min_delta: the smallest change that counts as an improvement.
        restore_best: let `fit` return the parameters and the statistics of the chunk with the best
            metric (the first of equals, whatever `min_delta`), also if the run ends in another way:
            by its epochs, or by another callback. A copy of the trained leaves is kept for that.
            The rest of the `TrainState` is that of the last step. A run that is saved keeps its
            best step on disk besides, as with `Checkpoints(best=1, metric=metric, mode=mode)`, and
            saves it whatever `every` is: a resumed run returns the same, and `load(run,
            step="best")` reads it.

    Returns:
        A callback. Put it last: those after it are not called for the chunk at which it ends the
        run. With `restore_best`, pass it to `fit` itself; a function that calls it does not ask
        for the best parameters.

    Raises:
        ValueError: `patience` is below 0 or `mode` is unknown; during training, the metric is not
            in the record. In `fit`, with `restore_best`: `Checkpoints(best=...)` or another
            callback asks for the best by another metric.
        CheckpointError: in `fit`, with `restore_best`: the best step of a run that is resumed is
            not saved, as it was started without.

    Example:
        >>> import jax.numpy as jnp, optax, jaxgrad as jg
        >>> stop = jg.callbacks.early_stopping("loss", patience=2, min_delta=1e-3)
        >>> loss = lambda p, batch: jnp.mean((p - batch) ** 2)
        >>> state = jg.fit(
        ...     loss, jnp.array(0.0), jnp.ones(4), optax.sgd(0.4), epochs=99, callbacks=[stop]
        ... )
        >>> state.step
        7

        Here the best is the second of six:

        >>> def rising(state):
        ...     return {"error": abs(float(state.params) - 0.6)}
        >>> keep = jg.callbacks.early_stopping("error", patience=2, restore_best=True)
        >>> tx, options = optax.sgd(0.2), {"epochs": 6, "callbacks": [rising, keep]}
        >>> state = jg.fit(loss, jnp.array(0.0), jnp.ones(4), tx, **options)
        >>> state.step, [round(record["error"], 2) for record in state.history]
        (5, [0.2, 0.04, 0.18, 0.27, 0.32])
        >>> print(round(float(state.params), 2))
        0.64

    Source: Keras's `EarlyStopping`.
    """
    if patience < 0:
        raise ValueError(f"patience={patience}; it must be 0 or more.")
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}; it must be 'min' or 'max'.")
    sign = 1.0 if mode == "min" else -1.0

    def callback(state: TrainState) -> None:
        if metric not in state.history[-1]:
            found = ", ".join(map(repr, state.history[-1]))
            raise ValueError(
                f"early_stopping: the record has no {metric!r}; it has {found}. Put early_stopping "
                "after the callback that adds the metric."
            )
        best, since = np.inf, 0
        for record in state.history:
            value = sign * record.get(metric, np.inf)
            best, since = (value, 0) if value < best - min_delta else (best, since + 1)
        if since > patience:
            raise StopTraining

    return RestoreBest(callback, metric, mode) if restore_best else callback


def write_jsonl(path: str | PathLike[str]) -> Callback:
    """Returns a callback that writes the history as JSON, one record per line.

    Args:
        path: the file. A resumed run replaces its content by the history of the run, so that no
            record appears twice.

    Returns:
        A callback. Of several processes, only the first writes.

    Raises:
        OSError: during training, the file can't be written.

    Example:
        >>> import tempfile, jax.numpy as jnp, optax, jaxgrad as jg
        >>> path = tempfile.mkdtemp() + "/log.jsonl"
        >>> write = jg.callbacks.write_jsonl(path)
        >>> loss = lambda p, batch: jnp.mean((p - batch) ** 2)
        >>> _ = jg.fit(
        ...     loss, jnp.array(0.0), jnp.ones(4), optax.sgd(0.5), epochs=2, callbacks=[write]
        ... )
        >>> import json
        >>> from pathlib import Path
        >>> [json.loads(line)["loss"] for line in Path(path).read_text().splitlines()]
        [1.0, 0.0]

    Source: the writers of `clu.metric_writers`.
    """
    path = Path(path)

    def callback(state: TrainState) -> None:
        if not is_first():
            return
        lines = [json.dumps(record) + "\n" for record in state.history]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            written = path.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            written = []
        if written == lines[:-1]:
            with path.open("a") as file:
                file.write(lines[-1])
            return
        with replacing(path) as file:
            file.write("".join(lines).encode())

    return callback


def write_tensorboard(directory: str | PathLike[str]) -> Callback:
    """Returns a callback that writes the history for TensorBoard.

    Args:
        directory: the directory to pass to `tensorboard --logdir`.

    Returns:
        A callback; the x axis is the step. Of several processes, only the first writes. It needs
        `pip install 'jaxgrad[tensorboard]'`.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed.

    Example:
        >>> import jaxgrad as jg
        >>> write = jg.callbacks.write_tensorboard("runs/logs")    # doctest: +SKIP

    Source: `torch.utils.tensorboard.SummaryWriter`.
    """
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "write_tensorboard needs tensorboardX: pip install 'jaxgrad[tensorboard]'",
            name="tensorboardX",
        ) from e
    writer = SummaryWriter(str(directory)) if is_first() else None

    def callback(state: TrainState) -> None:
        if writer is None:
            return
        record = state.history[-1]
        for name, value in record.items():
            if name != "step":
                writer.add_scalar(name, value, int(record["step"]))
        writer.flush()

    return callback


def plot_history(
    history: Sequence[Mapping[str, float]], path: str | PathLike[str] | None = None
) -> Any:
    """Draws losses and metrics over the steps.

    Args:
        history: `TrainState.history`.
        path: where to save the picture; the suffix (`.png`, `.svg`, `.pdf`) decides the format.

    Returns:
        The `matplotlib.figure.Figure`: losses on one axis, everything else on another. It needs
        `pip install 'jaxgrad[cli]'`.

    Raises:
        ValueError: the history is empty.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import jaxgrad as jg
        >>> history = [{"step": 1, "loss": 2.0, "accuracy": 0.5}, {"step": 2, "loss": 1.0}]
        >>> [axes.get_ylabel() for axes in jg.callbacks.plot_history(history).axes]
        ['loss', 'accuracy']

    Source: `History` of Keras, as its guides draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "plot_history needs matplotlib: pip install 'jaxgrad[cli]'", name="matplotlib"
        ) from e
    if not history:
        raise ValueError("there is nothing to draw: the history has no records.")
    names = dict.fromkeys(name for record in history for name in record)
    names = [n for n in names if n not in ("step", "epoch", "rows_per_s", "skipped")]
    panels = [[n for n in names if "loss" in n], [n for n in names if "loss" not in n]]
    panels = [panel for panel in panels if panel]
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        for name in panel:
            points = [(r["step"], r[name]) for r in history if name in r]
            axes.plot(
                *zip(*points, strict=True), marker="." if len(points) < 40 else "", label=name
            )
        axes.set(xlabel="step", ylabel=panel[0] if len(panel) == 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
        if len(panel) > 1:
            axes.legend(frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
