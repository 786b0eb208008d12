"""The outputs of a function for every example of a dataset, batch by batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._text import listed, spec
from jaxgrad._training.over_batches import OverBatches
from jaxgrad._tree.flat import PyTree, flatten, is_hole, is_key, is_value
from jaxgrad._tree.types import Batch, Params


def predict(
    fun: Callable[..., PyTree],
    params: Params,
    dataset: Batch,
    *,
    batch_size: int = 256,
    stats: PyTree = None,
) -> PyTree:
    """Returns the outputs of a function for all examples, in the order of the dataset.

    Args:
        fun: `fun(params, batch)`, pure, to an array or a pytree of arrays with the rows of the
            batch along axis 0. It is compiled; what it reads besides its arguments is read at its
            first call.
        params: any pytree. Leaves that are not arrays (a function, a Python number) stay what
            they are.
        dataset: what `fit` takes: a pytree of arrays with the rows along axis 0, or an iterable
            of batches whose pass ends, such as Grain's datasets and loaders.
        batch_size: the rows of a batch, if the dataset is arrays. The last one may be shorter.
        stats: the statistics of the model, if `fun` has an argument `stats`: it is called as
            `fun(params, batch, stats=stats)`.

    Returns:
        What `fun` returns, as NumPy arrays with a row for each example.

    Raises:
        RowsError: the arrays of the dataset or of a batch differ in their rows, or there are none.
        ValueError: an output does not have the rows of the batch, or batches have outputs of
            other shapes; `batch_size` is below 1; or `fun` takes statistics and there are none,
            or the other way round.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> params, x = {"w": jnp.ones((3, 2))}, jnp.arange(30.0).reshape(10, 3)
        >>> logits = jg.predict(lambda params, x: x @ params["w"], params, x, batch_size=4)
        >>> type(logits).__name__, logits.shape, logits[9].tolist()
        ('ndarray', (10, 2), [84.0, 84.0])

    Source: Keras's `Model.predict`.
    """
    run = OverBatches(fun, _checked, dataset, batch_size=batch_size, name="fun", caller="predict")
    outputs = [out for _, out in run(params, stats)]
    flats = [flatten(out) for out in outputs]
    for i, flat in enumerate(flats):
        if flat.treedef != flats[0].treedef or _widths(flat.leaves) != _widths(flats[0].leaves):
            raise ValueError(
                f"the outputs of batch {i + 1} are {_shown(outputs[i])}, and those of batch 1 "
                f"{_shown(outputs[0])}: all must have one structure and, but for their rows, one "
                "shape. Pad the batches to one length."
            )
    columns = zip(*(flat.leaves for flat in flats), strict=True)
    return flats[0].treedef.unflatten(
        [None if is_hole(column[0]) else np.concatenate(column) for column in columns]
    )


def _checked(out: PyTree, rows: int) -> PyTree:
    flat = flatten(out)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if is_hole(leaf):
            continue
        name = f"the output '{path}'" if path else "the output"
        if not is_value(leaf) or is_key(leaf):
            what = spec(leaf) if is_value(leaf) else f"of type {type(leaf).__name__}"
            raise ValueError(f"{name} is {what}, and no array that NumPy can hold. Leave it out.")
        if jnp.shape(leaf)[:1] != (rows,):
            raise ValueError(
                f"{name} is {spec(leaf)} for a batch of {rows} rows; it must have a row for each "
                "example along axis 0. Leave out what belongs to the batch or to the model; "
                "jaxgrad.evaluate reduces over batches."
            )
    return out


def _widths(leaves: list[Any]) -> list[Any]:
    return [None if is_hole(x) else x.shape[1:] for x in leaves]


def _shown(out: PyTree) -> str:
    flat = flatten(out)
    named = zip(flat.paths, flat.leaves, strict=True)
    shown = (f"'{p}' {spec(x)}" if p else spec(x) for p, x in named if not is_hole(x))
    return listed(shown) or str(jax.tree.structure(out))
