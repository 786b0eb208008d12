"""The gradient of each example by itself.

A batch's gradient is a mean, and a mean hides the mislabelled digit, the one sequence that blows
up, the class that pulls its own way. In JAX the gradient of one row is the gradient of a batch of
one, and `vmap` computes it for all rows at once, in the memory of one gradient per row; `chunk`
bounds that.
"""

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgrad._autograd.grad import grad
from jaxgrad._autograd.loss import call_loss, differentiable, scalar_value
from jaxgrad._autograd.rows import (
    RowsOption,
    check_apart,
    check_option,
    has_rows,
    place_of_value,
)
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_key
from jaxgrad._tree.merge import merge
from jaxgrad._tree.rows import common_rows
from jaxgrad._tree.wrt import Wrt

P = TypeVar("P")
X = ParamSpec("X")


def per_example_grads(
    loss: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    chunk: int | None = None,
    rows: RowsOption = "checked",
) -> Callable[Concatenate[P, X], P]:
    """Returns a function that computes the gradient of a loss at each example of a batch.

    Args:
        loss: `loss(params, *batch, **kwargs)`, pure, to a scalar; it is passed batches of one row,
            first axis included, so a loss written for batches works unchanged.
        wrt: which leaves of `params` to differentiate; see `select`.
        chunk: how many examples to differentiate at once; all if None. Gradients of one chunk
            take `chunk` times the memory of the selected leaves, besides the result.
        rows: "checked", the loss is traced at two batch sizes, and refused unless its examples are
            shown not to mix; "independent", you know that they don't.

    Returns:
        A function of the arguments of `loss`. Arrays in positional arguments have one row per
        example; a typed PRNG key in any argument gives each example a key of its own, and
        everything else goes to each unsplit. It returns a tree of the structure of `params`, where
        selected leaves have a new first axis, one entry per example, and the others are `None`.
        For a loss that is a mean over examples, the mean along this axis is its gradient; for one
        that is a sum, the sum is.

    Raises:
        SelectionError: see `value_and_grad`.
        GradientError: see `value_and_grad`; or the examples of the batch mix in the loss (BatchNorm
            in training mode, a softmax over the batch), or it divides by a count over all of them.
            The message has the source line.
        RowsError: the arrays of the batch differ in their rows, or there are none.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> loss = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
        >>> params = {"w": jnp.ones(2)}
        >>> x, y = jnp.array([[1.0, 2.0], [2.0, 1.0]]), jnp.array([2.0, 4.0])
        >>> print(jg.per_example_grads(loss)(params, x, y)["w"])
        [[ 2.  4.]
         [-4. -2.]]

    Source: `torch.func.vmap(torch.func.grad(...))`; Opacus' `grad_sample`.
    """
    check_option(rows)
    of_batch = grad(loss, wrt)

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        batch = _batch(args, kwargs)
        if rows == "checked":
            _check(loss, params, wrt, batch, "per_example_grads")
        return _each_row(lambda *a, **k: of_batch(params, *a, **k), batch, chunk)

    return wrapped


def grad_norms(
    loss: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    chunk: int | None = None,
    rows: RowsOption = "checked",
) -> Callable[Concatenate[P, X], P]:
    """Returns a function that computes the norm of each example's gradient, leaf by leaf.

    Args:
        loss: see `per_example_grads`.
        wrt: see `per_example_grads`.
        chunk: see `per_example_grads`; the gradients of one chunk are all that is in memory.
        rows: see `per_example_grads`.

    Returns:
        A function of the arguments of `loss` that returns a tree of the structure of `params`: for
        each selected leaf the Euclidean norms of its gradients, one per example, and `None` for the
        others. `jax.vmap(optax.tree.norm)` of that tree has the norm over all leaves.

    Raises:
        SelectionError: see `per_example_grads`.
        GradientError: see `per_example_grads`.
        RowsError: see `per_example_grads`.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> loss = lambda params, x, y: jnp.mean((x @ params["w"] - y) ** 2)
        >>> params, x, y = {"w": jnp.ones(2)}, jnp.eye(2), jnp.array([1.0, 4.0])
        >>> print(jg.grad_norms(loss)(params, x, y)["w"])  # the second label is off
        [0. 6.]

    Source: the EL2N and GraNd scores of Paul et al., "Deep Learning on a Data Diet" (2021).
    """
    check_option(rows)
    of_batch = grad(loss, wrt)

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        def norms(*args: Any, **kwargs: Any) -> PyTree:
            return jax.tree.map(_norm, of_batch(params, *args, **kwargs))

        batch = _batch(args, kwargs)
        if rows == "checked":
            _check(loss, params, wrt, batch, "grad_norms")
        return _each_row(norms, batch, chunk)

    return wrapped


def _norm(x: jax.Array) -> jax.Array:
    # Squares of half precision overflow at 256, and underflow below 1e-4.
    wide = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    return jnp.linalg.norm(x.astype(wide).ravel())


class _Batch(NamedTuple):
    """The arguments after the parameters: what has rows, and how many."""

    flat: Flat
    arrays: dict[int, jax.Array]
    rows: int


def _batch(args: tuple, kwargs: dict) -> _Batch:
    flat = flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat.leaves) if has_rows(flat.paths[i], leaf)}
    rows = common_rows(
        {flat.paths[i].partition("/")[2]: leaf.shape for i, leaf in arrays.items()},
        "per example: the arrays in positional arguments",
        "Pass the batch by position, f(params, batch), and what all examples share by keyword.",
    )
    return _Batch(flat, arrays, rows)


def _check(loss: Callable[..., Any], params: PyTree, wrt: Wrt, batch: _Batch, what: str) -> None:
    """Refuses a loss that mixes the examples, from its trace."""
    if batch.rows < 2:
        return
    selected, rest = differentiable(params, wrt).split(params)

    def value(selected: PyTree, args: tuple, kwargs: dict) -> jax.Array:
        return scalar_value(call_loss(loss, merge(selected, rest), args, kwargs))

    args, kwargs = batch.flat.treedef.unflatten(batch.flat.leaves)
    check_apart(place_of_value(value, selected, args, kwargs, rows=batch.rows, part=1), what)


def _each_row(fun: Callable[..., Any], batch: _Batch, chunk: int | None) -> Any:
    """`fun` of each row of the batch, as a batch of one, stacked along a new first axis."""
    flat, arrays, rows = batch
    keys = {i: leaf for i, leaf in enumerate(flat.leaves) if is_key(leaf) and leaf.ndim == 0}
    keys = {i: jax.random.split(key, rows) for i, key in keys.items()}

    def of_one(row: dict[int, jax.Array], keys: dict[int, jax.Array]) -> Any:
        mine = {i: x[None] for i, x in row.items()} | keys
        leaves = [mine.get(i, leaf) for i, leaf in enumerate(flat.leaves)]
        args, kwargs = flat.treedef.unflatten(leaves)
        return fun(*args, **kwargs)

    if chunk is None:
        return jax.vmap(of_one)(arrays, keys)
    return jax.lax.map(lambda one: of_one(*one), (arrays, keys), batch_size=chunk)
