"""The gradient of each example by itself.

A batch's gradient is a mean, and a mean hides the mislabelled digit, the one sequence that blows
up, the class that pulls its own way. In JAX the gradient of one row is the gradient of a batch of
one, and `vmap` computes it for all rows at once, in the memory of one gradient per row; `chunk`
bounds that.
"""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxgrad._autograd.grad import grad
from jaxgrad._autograd.microbatches import has_rows
from jaxgrad._tree.flat import PyTree, flatten, is_key
from jaxgrad._tree.rows import common_rows
from jaxgrad._tree.wrt import Wrt

P = TypeVar("P")
X = ParamSpec("X")


def per_example_grads(
    loss: Callable[Concatenate[P, X], ArrayLike], wrt: Wrt = "**", *, chunk: int | None = None
) -> Callable[Concatenate[P, X], P]:
    """Returns a function that computes the gradient of a loss at each example of a batch.

    Args:
        loss: `loss(params, *batch, **kwargs)`, pure, to a scalar; it is passed batches of one row,
            first axis included, so a loss written for batches works unchanged.
        wrt: which leaves of `params` to differentiate; see `select`.
        chunk: how many examples to differentiate at once; all if None. Gradients of one chunk
            take `chunk` times the memory of the selected leaves, besides the result.

    Returns:
        A function of the arguments of `loss`. Arrays in positional arguments have one row per
        example; a typed PRNG key in any argument gives each example a key of its own, and
        everything else goes to each unsplit. It returns a tree of the structure of `params`, where
        selected leaves have a new first axis, one entry per example, and the others are `None`.
        For a loss that is a mean over examples, the mean along this axis is its gradient.

    Raises:
        SelectionError: see `value_and_grad`.
        GradientError: see `value_and_grad`.
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
    of_batch = grad(loss, wrt)

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        return _each_row(lambda *a, **k: of_batch(params, *a, **k), args, kwargs, chunk)

    return wrapped


def grad_norms(
    loss: Callable[Concatenate[P, X], ArrayLike], wrt: Wrt = "**", *, chunk: int | None = None
) -> Callable[Concatenate[P, X], P]:
    """Returns a function that computes the norm of each example's gradient, leaf by leaf.

    Args:
        loss: see `per_example_grads`.
        wrt: see `per_example_grads`.
        chunk: see `per_example_grads`; the gradients of one chunk are all that is in memory.

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
    of_batch = grad(loss, wrt)

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        def norms(*args: Any, **kwargs: Any) -> PyTree:
            return jax.tree.map(_norm, of_batch(params, *args, **kwargs))

        return _each_row(norms, args, kwargs, chunk)

    return wrapped


def _norm(x: jax.Array) -> jax.Array:
    # Squares of half precision overflow at 256, and underflow below 1e-4.
    wide = x.dtype if x.dtype.itemsize >= 4 else jnp.float32
    return jnp.linalg.norm(x.astype(wide).ravel())


def _each_row(fun: Callable[..., Any], args: tuple, kwargs: dict, chunk: int | None) -> Any:
    """`fun` of each row of the batch, as a batch of one, stacked along a new first axis."""
    flat = flatten((args, kwargs))
    rows = {i: leaf for i, leaf in enumerate(flat.leaves) if has_rows(flat.paths[i], leaf)}
    count = common_rows(
        {flat.paths[i].partition("/")[2]: leaf.shape for i, leaf in rows.items()},
        "per example: the arrays in positional arguments",
        "Pass the batch by position, f(params, batch), and what all examples share by keyword.",
    )
    keys = {i: leaf for i, leaf in enumerate(flat.leaves) if is_key(leaf) and leaf.ndim == 0}
    keys = {i: jax.random.split(key, count) for i, key in keys.items()}

    def of_one(rows: dict[int, jax.Array], keys: dict[int, jax.Array]) -> Any:
        mine = {i: row[None] for i, row in rows.items()} | keys
        leaves = [mine.get(i, leaf) for i, leaf in enumerate(flat.leaves)]
        args, kwargs = flat.treedef.unflatten(leaves)
        return fun(*args, **kwargs)

    if chunk is None:
        return jax.vmap(of_one)(rows, keys)
    return jax.lax.map(lambda one: of_one(*one), (rows, keys), batch_size=chunk)
