"""Gradients of the selected leaves, and of those alone.

Everything here splits the parameters *before* it differentiates. Differentiating everything and
dropping the frozen part relies on dead-code elimination, which stops at the first thing that reads
the gradients: a norm, a check that they are finite, an accumulator, the boundary of a `jit`. After
the split a frozen leaf is a constant to JAX, and there is nothing to eliminate.
"""

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgrad._autograd.loss import GradientError, call_loss, differentiable, scalar_value
from jaxgrad._autograd.microbatches import Microbatches, accumulate, shared
from jaxgrad._autograd.rows import RowsOption
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import (
    PyTree,
    check_same_structure,
    flatten,
    is_hole,
)
from jaxgrad._tree.merge import merge
from jaxgrad._tree.select import select
from jaxgrad._tree.wrt import Wrt

P = TypeVar("P")
"""The type of the parameters, and so of their gradients."""

A = TypeVar("A")
"""What a loss returns besides its value."""

V = TypeVar("V")
"""The value of a function to differentiate."""

X = ParamSpec("X")
"""The arguments after the parameters."""

Weight: TypeAlias = Callable[..., ArrayLike]
"""How much a part of a batch counts, by the arguments of the loss after the parameters."""


@overload
def value_and_grad(
    fun: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[False] = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[False] = False,
) -> Callable[Concatenate[P, X], tuple[jax.Array, P]]: ...
@overload
def value_and_grad(
    fun: Callable[Concatenate[P, X], tuple[ArrayLike, A]],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[True],
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[False] = False,
) -> Callable[Concatenate[P, X], tuple[tuple[jax.Array, A], P]]: ...
@overload
def value_and_grad(
    fun: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[False] = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[True],
) -> Callable[Concatenate[P, X], tuple[jax.Array, tuple[P, Mapping[str, PyTree]]]]: ...
@overload
def value_and_grad(
    fun: Callable[Concatenate[P, X], tuple[ArrayLike, A]],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[True],
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[True],
) -> Callable[Concatenate[P, X], tuple[tuple[jax.Array, A], tuple[P, Mapping[str, PyTree]]]]: ...
@overload
def value_and_grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: bool = False,
) -> Callable[..., tuple[Any, Any]]: ...
def value_and_grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that computes `fun` and its gradient in the selected parameters.

    Args:
        fun: `fun(params, *args, **kwargs)`, pure, to a scalar; with `has_aux`, to
            `(scalar, aux)`.
        wrt: which leaves of `params` to differentiate; see `select`.
        has_aux: whether `fun` returns something besides the value to differentiate.
        microbatches: split the batch into this many equal parts and accumulate the gradient over
            them in a `scan`, so that the memory of one part is enough. Arrays in `args` are
            split along their first axis, a typed PRNG key in `args` or `kwargs` gives each
            part a key of its own, and everything else goes to each part unsplit. Value and
            gradient are means over the parts: those of the full batch, since `fun` must be a mean
            over examples.
        weight: how much a part counts in these means, a function of the positional arguments of
            `fun` after `params` to a real scalar that is not negative. For a `fun` that divides by
            a count over the batch it is this count, `lambda batch: jnp.sum(batch["mask"])` for a
            mean over tokens, and the results are those of the full batch again. A part of weight 0
            is left out; if all are 0, they count alike. By default all parts do.
        rows: "checked", `fun` is traced at two batch sizes, and refused unless its value is shown
            to be a mean over examples, each by itself (with `weight`, divided by a count);
            "independent", you know that it is. Derivatives of its own that `fun` has
            (`jax.custom_vjp`, `hook`) are not checked.
        taps: whether to return the cotangents of the values that `fun` names with `tap` as well.

    Returns:
        A function of the arguments of `fun` that returns `(value, grads)`, with `has_aux`
        `((value, aux), grads)`; with `taps`, `(grads, taps)` replaces `grads`, and `taps` is a dict
        from the names to the cotangents (see `tap`), stacked as `aux` is. `grads` has the
        structure of `params`, shapes and dtypes of the selected leaves, and `None` for the
        others. The `aux` of microbatches is stacked along a new first axis. The function composes
        with `jit`, `vmap`, `scan` and itself.

    Raises:
        SelectionError: see `select`; or a selected leaf is not a float, or is a running statistic.
        GradientError: `fun` does not return a scalar, or changed the state of an NNX module in
            `params` (which would be lost); or the batch can't be split evenly; or the examples of
            the batch mix in `fun`, it is a sum over them, or a weighted mean and there is no
            `weight`. The message has the source line.
        RowsError: `microbatches` is given, and the arrays of the batch differ in their rows.
        TapError: see `tap`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, x):
        ...     return jnp.sum(params["w"] * x + params["b"])
        >>> params = {"w": jnp.array([2.0, 3.0]), "b": jnp.array([0.0, 1.0])}
        >>> value, grads = jax.jit(jg.value_and_grad(loss, wrt="w"))(params, jnp.ones(2))
        >>> print(value, grads["w"], grads["b"])
        6.0 [1. 1.] None

    Source: `loss.backward()` after `requires_grad_(False)` on the frozen parameters; the
    microbatches are PyTorch's loop over `backward` without `zero_grad`.
    """
    parts = None if microbatches is None else Microbatches(microbatches, weight, rows)
    if parts is None and weight is not None:
        raise GradientError(
            "weight says how much each part of a batch counts, and the batch is not split: pass "
            "microbatches= too."
        )

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        selected, rest = differentiable(params, wrt).split(params)

        def of_selected(selected: PyTree, args: tuple, kwargs: dict) -> tuple[jax.Array, Any]:
            whole = merge(selected, rest)
            out = call_loss(fun, whole, args, kwargs)
            value, aux = out if has_aux else (out, None)
            return scalar_value(value), aux

        differentiate = jax.value_and_grad(of_selected, has_aux=True)
        if taps:
            from jaxgrad._autograd.tap import value_and_grads_of_taps

            differentiate = value_and_grads_of_taps(of_selected)
        shares = None
        if parts is None:
            (value, aux), grads = differentiate(selected, args, kwargs)
        else:
            value, aux, grads, shares = accumulate(
                parts, of_selected, differentiate, selected, args, kwargs
            )
        if taps:
            aux, named = aux
            if shares is not None:  # the value is the mean of the parts
                named = jax.tree.map(lambda cotangent: shared(cotangent, shares), named)
            grads = grads, named
        return ((value, aux) if has_aux else value), grads

    return wrapped


@overload
def grad(
    fun: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[False] = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[False] = False,
) -> Callable[Concatenate[P, X], P]: ...
@overload
def grad(
    fun: Callable[Concatenate[P, X], tuple[ArrayLike, A]],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[True],
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[False] = False,
) -> Callable[Concatenate[P, X], tuple[P, A]]: ...
@overload
def grad(
    fun: Callable[Concatenate[P, X], ArrayLike],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[False] = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[True],
) -> Callable[Concatenate[P, X], tuple[P, Mapping[str, PyTree]]]: ...
@overload
def grad(
    fun: Callable[Concatenate[P, X], tuple[ArrayLike, A]],
    wrt: Wrt = "**",
    *,
    has_aux: Literal[True],
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: Literal[True],
) -> Callable[Concatenate[P, X], tuple[tuple[P, Mapping[str, PyTree]], A]]: ...
@overload
def grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: bool = False,
) -> Callable[..., Any]: ...
def grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    weight: Weight | None = None,
    rows: RowsOption = "checked",
    taps: bool = False,
) -> Callable[..., Any]:
    """Returns a function that computes the gradient of `fun` in the selected parameters.

    Args:
        fun: see `value_and_grad`.
        wrt: see `value_and_grad`.
        has_aux: see `value_and_grad`.
        microbatches: see `value_and_grad`.
        weight: see `value_and_grad`.
        rows: see `value_and_grad`.
        taps: see `value_and_grad`.

    Returns:
        A function of the arguments of `fun` that returns `grads`, with `has_aux`
        `(grads, aux)`; with `taps`, `(grads, taps)` replaces `grads`. See `value_and_grad`.

    Raises:
        SelectionError: see `value_and_grad`.
        GradientError: see `value_and_grad`.
        TapError: see `tap`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> cube = lambda p: p["a"] ** 3 * p["b"]
        >>> params = {"a": jnp.array(2.0), "b": jnp.array(5.0)}
        >>> print(jg.grad(cube, wrt="a")(params))
        {'a': Array(60., dtype=float32, weak_type=True), 'b': None}
        >>> hessian = jax.jacfwd(jg.grad(cube, wrt="a"))(params)
        >>> print(hessian["a"]["a"], hessian["a"]["b"])
        60.0 12.0

    Source: `torch.autograd.grad(outputs, inputs)`.
    """
    both = value_and_grad(
        fun,
        wrt,
        has_aux=has_aux,
        microbatches=microbatches,
        weight=weight,
        rows=rows,
        taps=taps,
    )

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        value, grads = both(params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def backward(
    fun: Callable[..., V],
    params: P,
    *args: PyTree,
    gradient: PyTree = None,
    wrt: Wrt = "**",
) -> tuple[V, P]:
    """Returns the value of `fun` and its vector-Jacobian product with `gradient`.

    Args:
        fun: `fun(params, *args)`, pure, to an array of any shape or a pytree of arrays.
        params: any pytree.
        *args: further arguments of `fun`, not differentiated.
        gradient: the cotangent, of the structure, shapes and dtypes of the value. If it is
            `None`, the value must be real and have one element, whose cotangent is 1; an integer
            value has none.
        wrt: which leaves of `params` to differentiate; see `select`.

    Returns:
        `(value, grads)`; `grads` has the structure of `params`, with `None` for leaves that are
        not selected. Nothing is stored and nothing accumulates: a second call returns the same.
        For complex numbers the gradient is JAX's, the conjugate of PyTorch's.

    Raises:
        SelectionError: see `select`; or a selected leaf is not a float, or is a running statistic.
        GradientError: `gradient` is missing for a value that is not a real scalar, or has another
            structure, shape or dtype than the value; or no value is of a floating-point dtype.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> f = lambda t: 3 * t["a"] ** 3 - t["b"] ** 2
        >>> t = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([6.0, 4.0])}
        >>> q, g = jg.backward(f, t, gradient=jnp.ones(2))
        >>> print(q, g["a"], g["b"])
        [-12.  65.] [36. 81.] [-12.  -8.]
        >>> q, g = jg.backward(f, t, gradient=jnp.ones(2), wrt="a")
        >>> print(g["b"])
        None

    Source: `Tensor.backward(gradient=...)`.
    """
    selected, rest = differentiable(params, wrt).split(params)
    value, pullback = jax.vjp(lambda s: call_loss(fun, merge(s, rest), args, {}), selected)
    if not any(jnp.issubdtype(y.dtype, jnp.inexact) for y in jax.tree.leaves(value)):
        raise GradientError(
            f"fun returns {listed(map(spec, jax.tree.leaves(value))) or 'no array'}: only "
            "floating-point values have a gradient."
        )
    return value, pullback(_cotangents(value, gradient))[0]


def stop_gradient(tree: P, wrt: Wrt = "**") -> P:
    """Stops differentiation at the leaves that `wrt` selects.

    Args:
        tree: any pytree.
        wrt: the leaves to treat as constants; see `select`.

    Returns:
        The tree with the same values; no gradient flows through the leaves selected.

    Raises:
        SelectionError: see `select`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> f = lambda p: jnp.sum(p["a"] * jg.stop_gradient(p, "b")["b"])
        >>> g = jax.grad(f)({"a": jnp.ones(2), "b": jnp.full(2, 3.0)})
        >>> print(g["a"], g["b"])
        [3. 3.] [0. 0.]

    Source: `Tensor.detach`. To train a part of a model use `wrt`, which computes nothing for
    the rest; this is for a value inside a loss (a target network, a straight-through step).
    """
    return select(tree, wrt).map(jax.lax.stop_gradient, tree)


def _cotangents(value: PyTree, gradient: PyTree) -> PyTree:
    """The cotangent of each array of the value, by the rules of `torch.autograd.backward`."""
    out = flatten(value)
    given: list[Any] = [None] * len(out.leaves)
    if gradient is not None:
        flat = flatten(gradient)
        check_same_structure(out, flat, "the value of fun", "gradient", GradientError)
        given = flat.leaves
    return out.treedef.unflatten(
        [
            None if is_hole(y) else _cotangent(f"value '{path}'" if path else "value", y, g)
            for path, y, g in zip(out.paths, out.leaves, given, strict=True)
        ]
    )


def _cotangent(what: str, y: jax.Array, gradient: Any) -> Any:
    if not jnp.issubdtype(y.dtype, jnp.inexact):
        if gradient is not None:
            raise GradientError(
                f"the {what} is {spec(y)}, which has no gradient; pass None for it in gradient=."
            )
        return np.zeros(y.shape, jax.dtypes.float0)
    if gradient is None:
        if y.size != 1 or jnp.issubdtype(y.dtype, jnp.complexfloating):
            raise GradientError(
                f"the {what} is {spec(y)}, not a real scalar, so backward needs gradient=, a "
                "cotangent of that shape and dtype (ones for the gradient of the sum)."
            )
        return jnp.ones(y.shape, y.dtype)
    if isinstance(gradient, int | float | complex):
        dtype = y.dtype  # a Python number takes the dtype of the value
    else:
        dtype = jax.dtypes.canonicalize_dtype(gradient.dtype)
    if jnp.shape(gradient) != y.shape or dtype != y.dtype:
        raise GradientError(
            f"gradient is {spec(gradient)}, but the {what} is {spec(y)}; a cotangent has "
            f"the shape and dtype of the value. Use jnp.broadcast_to or .astype({str(y.dtype)!r})."
        )
    return jnp.asarray(gradient, y.dtype)
