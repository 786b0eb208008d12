"""Gradients of the selected leaves, and of those alone.

Everything here splits the parameters *before* it differentiates. To differentiate all and
drop the frozen part leaves the work to dead-code elimination, which stops at the first thing
that reads the gradients: a norm, a check that they are finite, an accumulator, the boundary
of a `jit`. After the split a frozen leaf is a constant to JAX, and there is nothing to drop.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._messages import listed, spec
from jaxgrad._select import (
    PyTree,
    SelectionError,
    Wrt,
    check_same_structure,
    flatten,
    halves,
    is_array,
    is_hole,
    is_key,
    merge,
    nnx_types,
    partition,
)

T = TypeVar("T")


class GradientError(ValueError):
    """A loss, cotangent or batch that can't be differentiated as asked: the message says why."""

    __module__ = "jaxgrad"


def value_and_grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    taps: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """Returns a function for the value of `fun` and its gradient in the selected parameters.

    Args:
        fun: `fun(params, *args, **kwargs)`, pure, to a scalar; with `has_aux`, to
            `(scalar, aux)`.
        wrt: which leaves of `params` to differentiate; see `select`.
        has_aux: whether `fun` returns something beside the value to differentiate.
        microbatches: split the batch in this many equal parts and accumulate the gradient over
            them in a `scan`, so that the memory of one part is enough. Arrays in `args` are
            split along their first axis, a typed PRNG key in `args` or `kwargs` gives each
            part a key of its own, and everything else goes to each part whole. Value and
            gradient are means over the parts: those of the whole batch for a `fun` that is a
            mean over examples.
        taps: whether to return the cotangents of the values that `fun` names with `tap` as well.

    Returns:
        A function of the arguments of `fun` that returns `(value, grads)`, with `has_aux`
        `((value, aux), grads)`; with `taps`, `(grads, taps)` stands for `grads`, and `taps` is a
        dict from the names to the cotangents (see `tap`), stacked as `aux` is. `grads` has the
        structure of `params`, shapes and dtypes of the selected leaves, and `None` for the
        others. The `aux` of microbatches is stacked along a new first axis. The function composes
        with `jit`, `vmap`, `scan` and itself.

    Raises:
        SelectionError: see `select`; or a selected leaf is no float, or a running statistic.
        GradientError: `fun` returns no scalar, changed the state of an NNX module in `params`
            (which would be lost), or the batch can't be split evenly.
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
    if microbatches is not None and microbatches < 1:
        raise GradientError(f"microbatches={microbatches}; it must be 1 or more, or None.")

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        selected, rest = split_for_grad(params, wrt)

        def of_selected(selected: PyTree, args: tuple, kwargs: dict) -> tuple[jax.Array, Any]:
            whole = merge(selected, rest)
            out = _call(fun, whole, args, kwargs)
            value, aux = out if has_aux else (out, None)
            return _scalar(value), aux

        differentiate = jax.value_and_grad(of_selected, has_aux=True)
        if taps:
            from jaxgrad._tap import value_and_grads_of_taps  # only here: the import stays fast

            differentiate = value_and_grads_of_taps(of_selected)
        if microbatches is None:
            (value, aux), grads = differentiate(selected, args, kwargs)
        else:
            value, aux, grads = _accumulate(differentiate, selected, args, kwargs, microbatches)
        if taps:
            aux, named = aux
            if microbatches is not None:  # the value is the mean of the parts
                named = jax.tree.map(lambda cotangent: cotangent / microbatches, named)
            grads = grads, named
        return ((value, aux) if has_aux else value), grads

    return wrapped


def grad(
    fun: Callable[..., Any],
    wrt: Wrt = "**",
    *,
    has_aux: bool = False,
    microbatches: int | None = None,
    taps: bool = False,
) -> Callable[..., PyTree]:
    """Returns a function for the gradient of `fun` in the selected parameters.

    Args:
        fun: see `value_and_grad`.
        wrt: see `value_and_grad`.
        has_aux: see `value_and_grad`.
        microbatches: see `value_and_grad`.
        taps: see `value_and_grad`.

    Returns:
        A function of the arguments of `fun` that returns `grads`, with `has_aux`
        `(grads, aux)`; with `taps`, `(grads, taps)` stands for `grads`. See `value_and_grad`.

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
    both = value_and_grad(fun, wrt, has_aux=has_aux, microbatches=microbatches, taps=taps)

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        value, grads = both(params, *args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def backward(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    gradient: PyTree = None,
    wrt: Wrt = "**",
) -> tuple[Any, PyTree]:
    """Returns the value of `fun` and its vector-Jacobian product with `gradient`.

    Args:
        fun: `fun(params, *args)`, pure, to an array of any shape or a pytree of arrays.
        params: any pytree.
        *args: further arguments of `fun`, not differentiated.
        gradient: the cotangent, of the structure, shapes and dtypes of the value. Where it is
            `None`, the value must be real and have one element, whose cotangent is 1; an integer
            value has none.
        wrt: which leaves of `params` to differentiate; see `select`.

    Returns:
        `(value, grads)`; `grads` has the structure of `params`, with `None` for leaves that are
        not selected. Nothing is stored and nothing accumulates: a second call gives the same.
        For complex numbers the gradient is JAX's, the conjugate of PyTorch's.

    Raises:
        SelectionError: see `select`; or a selected leaf is no float, or a running statistic.
        GradientError: `gradient` is missing for a value that is no real scalar, or has another
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
    selected, rest = split_for_grad(params, wrt)
    value, pullback = jax.vjp(lambda s: _call(fun, merge(s, rest), args, {}), selected)
    if not any(jnp.issubdtype(y.dtype, jnp.inexact) for y in jax.tree.leaves(value)):
        raise GradientError(
            f"fun returns {listed(map(spec, jax.tree.leaves(value))) or 'no array'}, which has no "
            "gradient: only floating-point values have."
        )
    return value, pullback(_cotangents(value, gradient))[0]


def stop_gradient(tree: T, where: Wrt = "**") -> T:
    """Cuts the leaves that `where` selects off from differentiation.

    Args:
        tree: any pytree.
        where: the leaves to cut off; see `select`.

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

    Source: `Tensor.detach`. To train a part of a model take `wrt`, which computes nothing for
    the rest; this is for a value inside of a loss (a target network, a straight-through step).
    """
    selected, rest = partition(tree, where)
    return merge(jax.tree.map(jax.lax.stop_gradient, selected), rest)


def checked(fun: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`fun`, with what `value_and_grad` refuses of a loss refused when it is called or traced."""

    def wrapped(params: PyTree, *args: Any, **kwargs: Any) -> jax.Array:
        return _scalar(_call(fun, params, args, kwargs))

    return wrapped


def split_for_grad(params: PyTree, wrt: Wrt) -> tuple[PyTree, PyTree]:
    """`partition`, where each selected leaf can have a gradient."""
    selected, rest = partition(params, wrt)
    flat = flatten(selected)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if is_hole(leaf):
            continue
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise SelectionError(
                f"wrt selects '{path}', which is {spec(leaf)} and has no gradient: "
                f"only floating-point leaves have. Exclude it: wrt=[..., '!{path}']."
            )
    _refuse_statistics(selected)
    return selected, rest


def _refuse_statistics(selected: PyTree) -> None:
    statistic = nnx_types("BatchStat")
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        selected, is_leaf=lambda x: isinstance(x, statistic)
    )
    for path, node in nodes:
        if isinstance(node, statistic) and jax.tree.leaves(node):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise SelectionError(
                f"wrt selects '{name}', a running statistic ({type(node).__name__}), which no "
                f"optimizer should move. Exclude it: wrt=[..., '!{name}']; or take parameters "
                "and statistics apart with `jaxgrad.functional(model)`."
            )


def _call(fun: Callable[..., Any], params: PyTree, args: tuple, kwargs: dict) -> Any:
    """Calls `fun`, and refuses to lose what it writes into an NNX module among the parameters.

    A module rebuilt from its leaves is a copy: new running statistics and random counts would
    be dropped with it, and neither Flax nor JAX says so.
    """
    before = _writable(params)
    out = fun(params, *args, **kwargs)
    if before:
        after = _writable(params)
        changed = [f"'{path}'" for path, x in before.items() if after.get(path, x) is not x]
        if changed:
            raise GradientError(
                f"the loss changes {listed(changed)} of the NNX module it is given. That is "
                "lost, for the module is a copy. Take `apply, params = jaxgrad.functional(model)`: "
                "`apply.train` returns new statistics and draws from a key that you pass."
            )
    return out


def _writable(tree: PyTree) -> dict[str, Any]:
    """What an NNX module may write as it is called, by path: all but its parameters.

    Parameters are left out because `nnx.remat` and `nnx.jit` write back what they were passed.
    """
    variable, param = nnx_types("Variable"), nnx_types("Param")
    if not variable:
        return {}
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, variable))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, node in nodes
        if isinstance(node, variable) and not isinstance(node, param)
        for leaf in jax.tree.leaves(node)
    }


def _scalar(value: Any) -> jax.Array:
    if not is_array(value):
        raise GradientError(
            f"the loss returns {type(value).__name__}, not a scalar. Where it returns "
            "(value, aux), pass has_aux=True."
        )
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise GradientError(
            f"the loss returns {spec(value)}; a gradient needs a real scalar. "
            "Reduce it (jnp.mean), or give a cotangent: jaxgrad.backward(..., gradient=...)."
        )
    return value


def _accumulate(
    differentiate: Callable[..., Any], selected: PyTree, args: tuple, kwargs: dict, parts: int
) -> tuple[jax.Array, Any, PyTree]:
    """Means over the parts of the batch; the carry holds one gradient of the selected leaves."""
    split, whole = _microbatches(args, kwargs, parts)
    # Sums of many small gradients lose digits in half precision.
    total = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), _wide(jnp.result_type(x))), selected)

    def step(total: PyTree, part: PyTree) -> tuple[PyTree, tuple[jax.Array, Any]]:
        (value, aux), grads = differentiate(selected, *merge(part, whole))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), (value, aux)

    total, (values, aux) = jax.lax.scan(step, total, split, length=parts)
    grads = jax.tree.map(lambda t, x: (t / parts).astype(jnp.result_type(x)), total, selected)
    return values.mean(), aux, grads


def _microbatches(args: tuple, kwargs: dict, parts: int) -> tuple[PyTree, PyTree]:
    """What differs from part to part, stacked along a new first axis, and what does not."""
    flat = flatten((args, kwargs))
    leaves, differs = list(flat.leaves), []
    rows, source = None, ""
    for i, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
        where, _, name = path.partition("/")
        if key := (is_key(leaf) and leaf.ndim == 0):
            leaves[i] = jax.random.split(leaf, parts)
        batched = where == "0" and is_array(leaf) and jnp.ndim(leaf) > 0
        differs.append(key or batched)
        if not batched:
            continue
        n = leaf.shape[0]
        rows, source = (n, name) if rows is None else (rows, source)
        if n != rows:
            raise GradientError(
                f"microbatches: argument '{name}' has {n} rows and '{source}' has {rows}; arrays "
                "in positional arguments are split along their first axis. Pass what belongs to "
                "every part whole by keyword."
            )
        if n % parts:
            raise GradientError(
                f"microbatches={parts} does not divide the {n} rows of argument '{name}'."
            )
        leaves[i] = leaf.reshape(parts, n // parts, *leaf.shape[1:])
    whole = [
        path.partition("/")[2]
        for path, leaf, differ in zip(flat.paths, flat.leaves, differs, strict=True)
        if is_array(leaf) and jnp.ndim(leaf) > 0 and not differ
    ]
    if rows is None and (whole or not any(differs)):
        raise GradientError(
            f"microbatches={parts} and no positional argument to split"
            + (f": {listed(map(repr, whole))} would go to each part whole" if whole else "")
            + ". Pass the batch by position: loss_and_grad(params, batch)."
        )
    return halves(flat._replace(leaves=leaves), differs)


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
        dtype = y.dtype  # a Python number has the dtype of what it meets
    else:
        dtype = jax.dtypes.canonicalize_dtype(gradient.dtype)
    if jnp.shape(gradient) != y.shape or dtype != y.dtype:
        raise GradientError(
            f"gradient is {spec(gradient)} where the {what} is {spec(y)}; a cotangent has "
            f"the shape and dtype of the value. Use jnp.broadcast_to or .astype({str(y.dtype)!r})."
        )
    return jnp.asarray(gradient, y.dtype)


def _wide(dtype: Any) -> Any:
    return jnp.float32 if dtype.itemsize < 4 else dtype
