"""Metrics of a dataset, batch by batch: means over its rows, or totals over weights."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad._text import listed, spec
from jaxgrad._training.over_batches import OverBatches
from jaxgrad._tree.flat import PyTree, is_key, is_value
from jaxgrad._tree.types import Batch, Params


def evaluate(
    metrics: Callable[..., Mapping[str, Any]],
    params: Params,
    dataset: Batch,
    *,
    batch_size: int = 256,
    stats: PyTree = None,
) -> dict[str, float]:
    """Returns the metrics of a model over a dataset.

    Args:
        metrics: `metrics(params, batch)`, pure, to a dict. Each value is a real scalar, a mean
            over the rows of the batch; or a pair of scalars `(total, weight)`, for a metric that
            is not a mean over rows, such as recall or a mean over tokens. It is compiled; what it
            reads besides its arguments is read at its first call.
        params: any pytree. Leaves that are not arrays (a function, a Python number) stay what
            they are.
        dataset: what `fit` takes: a pytree of arrays with the rows along axis 0, or an iterable
            of batches whose pass ends, such as Grain's datasets and loaders.
        batch_size: the rows of a batch, if the dataset is arrays. The last one may be shorter.
        stats: the statistics of the model, if `metrics` has an argument `stats`: it is called as
            `metrics(params, batch, stats=stats)`.

    Returns:
        A float for each name: the mean over all rows, or the sum of the totals divided by the sum
        of the weights, NaN where that is 0. Sums over batches are in float64.

    Raises:
        RowsError: the arrays of the dataset or of a batch differ in their rows, or there are none.
        ValueError: a metric is not a scalar, or another one than before; `batch_size` is below 1;
            or `metrics` takes statistics and there are none, or the other way round.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> def metrics(params, batch):
        ...     positive, found = batch["y"] > 0, batch["x"] * params > 0
        ...     recall = jnp.sum(positive & found), jnp.sum(positive)
        ...     return {"accuracy": jnp.mean(positive == found), "recall": recall}
        >>> test = {"x": jnp.array([1.0, -1.0, 2.0, -2.0, 3.0]), "y": jnp.array([1, 0, 1, 1, 0])}
        >>> {name: round(x, 3) for name, x in jg.evaluate(metrics, jnp.array(1.0), test).items()}
        {'accuracy': 0.6, 'recall': 0.667}

    Source: the test loop of the PyTorch tutorials, under `torch.no_grad()`, and `clu.metrics`.
    """
    run = evaluator(metrics, dataset, batch_size, "evaluate")
    return means(run(params, stats))


def evaluator(
    metrics: Callable[..., Mapping[str, Any]], dataset: Batch, batch_size: int, caller: str
) -> OverBatches:
    """The metrics of each batch; see `evaluate`."""
    return OverBatches(
        metrics, _checked, dataset, batch_size=batch_size, name="metrics", caller=caller
    )


def means(results: Iterator[tuple[int, Mapping[str, tuple[Any, ...]]]]) -> dict[str, float]:
    """The metrics of a dataset, by those of its batches.

    Raises:
        ValueError: the batches differ in their metrics.
    """
    sums: dict[str, np.ndarray] = {}
    kinds: dict[str, int] = {}
    for i, (rows, metrics) in enumerate(results):
        found = {name: len(parts) for name, parts in metrics.items()}
        if i and found != kinds:
            raise ValueError(
                f"metrics return {_kinds(found)} for batch {i + 1}, of {rows} rows, and "
                f"{_kinds(kinds)} for those before. Return the same metrics for every batch."
            )
        kinds = found
        for name, parts in metrics.items():
            total, weight = map(float, parts if len(parts) == 2 else (parts[0], rows))
            total = total if len(parts) == 2 else total * rows
            sums[name] = sums.get(name, np.zeros(2)) + np.array([total, weight])
    return {name: float(t / w) if w else float("nan") for name, (t, w) in sums.items()}


def _kinds(found: Mapping[str, int]) -> str:
    pair = " (a pair)"
    return listed(f"'{name}'{pair * (n == 2)}" for name, n in found.items()) or "nothing"


def _checked(metrics: Any, rows: int) -> OrderedDict[str, tuple[Any, ...]]:
    """Metrics as `(mean,)` or `(total, weight)`, in their order, which `jax.jit` keeps of these."""
    if not isinstance(metrics, Mapping):
        what = spec(metrics) if is_value(metrics) else type(metrics).__name__
        raise ValueError(
            f'metrics return {what}, not a dict. Return a name for each value: {{"loss": value}}.'
        )
    return OrderedDict((name, _parts(name, value, rows)) for name, value in metrics.items())


def _parts(name: object, value: Any, rows: int) -> tuple[Any, ...]:
    if not isinstance(name, str):
        raise ValueError(f"metrics return a value by {name!r}; the name of a metric is a string.")
    is_pair = isinstance(value, tuple | list)
    parts = tuple(value) if is_pair else (value,)
    if all(map(_is_scalar, parts)) and len(parts) == 2 - (not is_pair):
        return tuple(map(jnp.asarray, parts))
    shown = listed(spec(x) if is_value(x) else type(x).__name__ for x in parts)
    shown = f"({shown})" if is_pair else shown
    raise ValueError(
        f"the metric '{name}' is {shown}, of a batch of {rows} rows; it must be a real scalar, a "
        "mean over the rows (jnp.mean), or a pair (total, weight) of two scalars (jnp.sum)."
    )


def _is_scalar(x: Any) -> bool:
    if not is_value(x) or is_key(x):
        return False
    return jnp.shape(x) == () and not jnp.iscomplexobj(x)
