"""Compares gradients with finite differences, leaf by leaf.

A model with a wrong sign in a `custom_vjp` still trains, only worse. Central differences reveal it
if they are precise: in float64, with the step that balances rounding and truncation (the cube root
of the machine epsilon), and at a point where the loss is differentiable. So the check converts its
arguments, looks for lower precision inside the loss, and reports a `kink` where the differences to
the left and to the right disagree.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.typing import ArrayLike

from jaxgrad._autograd.grad import grad
from jaxgrad._autograd.loss import GradientError, differentiable
from jaxgrad._jaxpr.dataflow import depending, reads
from jaxgrad._jaxpr.inline import inline
from jaxgrad._jaxpr.source import aval
from jaxgrad._jaxpr.views import bodies
from jaxgrad._text import listed, numel, spec, table
from jaxgrad._tree.flat import PyTree, flatten, is_array, is_hole
from jaxgrad._tree.merge import merge
from jaxgrad._tree.types import Loss, Params
from jaxgrad._tree.wrt import Wrt


@dataclasses.dataclass(frozen=True)
class CheckedPath:
    """The verdict on the gradient of one leaf.

    Attributes:
        path: the path of the leaf.
        verdict: `right`, `wrong`, or `kink` if the loss is not differentiable there.
        directions: the number of directions compared; 0 for a leaf without elements, which is
            always right.
        gradient: the directional derivative from the gradient, where the two differ most.
        difference: the directional derivative from finite differences, in the same direction.
    """

    path: str
    verdict: str
    directions: int
    gradient: float
    difference: float


@dataclasses.dataclass(frozen=True, repr=False)
class GradCheck:
    """The result of `check_grads`. Its repr is a table.

    Attributes:
        paths: the verdict on each selected leaf.
        precision: the lowest floating-point precision inside the loss.
    """

    paths: tuple[CheckedPath, ...]
    precision: str

    @property
    def wrong(self) -> tuple[CheckedPath, ...]:
        """The leaves whose gradients are wrong."""
        return tuple(p for p in self.paths if p.verdict == "wrong")

    def raise_if_wrong(self) -> "GradCheck":
        """Returns itself, or raises an error if a gradient is wrong.

        Raises:
            GradientError: a gradient differs from finite differences; the message names the paths.
        """
        if self.wrong:
            found = (
                f"'{p.path}' ({p.gradient:.6g}; finite differences give {p.difference:.6g})"
                for p in self.wrong
            )
            raise GradientError(
                f"wrong gradient: {listed(found)}. Look for a stop_gradient, or a custom_vjp or "
                "custom_jvp whose rule is not the derivative of its function."
            )
        return self

    def __repr__(self) -> str:
        header = ("path", "verdict", "directions", "gradient", "difference")
        rows = [
            (p.path, p.verdict, str(p.directions), f"{p.gradient:.6g}", f"{p.difference:.6g}")
            for p in self.paths
        ]
        right = sum(p.verdict == "right" for p in self.paths)
        total = f"{right} of {len(self.paths)} right, compared in {self.precision}"
        return "\n".join([*table([header, *rows]), total])


def check_grads(
    loss: Loss,
    params: Params,
    *args: PyTree,
    wrt: Wrt = "**",
    directions: int = 16,
    key: jax.Array | None = None,
    **kwargs: PyTree,
) -> GradCheck:
    """Compares the gradient of a loss with central finite differences, leaf by leaf.

    Args:
        loss: a pure function, `loss(params, *args, **kwargs)`, that returns a scalar.
        params: any pytree of concrete arrays; tracers do not work, so call this outside `jit`.
        *args: further arguments of `loss`.
        wrt: the leaves of `params` to check; see `select`.
        directions: checks each element of a leaf with at most this many, and a larger leaf in this
            many random directions. Each direction takes two evaluations of the loss.
        key: the typed PRNG key for the directions; `jax.random.key(0)` if None.
        **kwargs: further arguments of `loss`.

    Returns:
        The verdicts. All floats in the arguments are converted to float64, whatever JAX's
        configuration. Arrays that the loss closes over, and its casts, keep their precision; if
        that is lower, steps and tolerances are wider.

    Raises:
        SelectionError: see `value_and_grad`.
        GradientError: see `value_and_grad`; or no selected leaf has an element, or `directions` is
            not positive, so that there is nothing to compare.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> @jax.custom_vjp
        ... def square(x):
        ...     return x**2
        >>> square.defvjp(lambda x: (x**2, x), lambda x, g: (3 * x * g,))  # should be 2
        >>> loss = lambda p: jnp.sum(square(p["a"])) + jnp.sum(jnp.sin(p["b"]))
        >>> jg.check_grads(loss, {"a": jnp.ones(2), "b": jnp.zeros(3)})
        path  verdict  directions  gradient  difference
        a     wrong    2           3         2
        b     right    3           1         1
        1 of 2 right, compared in float64

    Source: `torch.autograd.gradcheck`.
    """
    if directions < 1:
        raise GradientError(f"directions={directions}; it must be 1 or more.")
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, args, kwargs = (_doubled(tree) for tree in (params, args, kwargs))
        selected, rest = differentiable(params, wrt).split(params)
        _check_not_empty(selected)
        others = flatten((rest, args, kwargs))
        # Passed as arguments, because XLA spends seconds on folding constants of this size.
        arrays = {i: leaf for i, leaf in enumerate(others.leaves) if hasattr(leaf, "dtype")}

        def of_arrays(selected: PyTree, arrays: dict[int, jax.Array]) -> ArrayLike:
            leaves = [arrays.get(i, leaf) for i, leaf in enumerate(others.leaves)]
            rest, args, kwargs = others.treedef.unflatten(leaves)
            return loss(merge(selected, rest), *args, **kwargs)

        value = jax.jit(of_arrays)
        precision = _precision(jax.make_jaxpr(lambda s: of_arrays(s, arrays))(selected))
        grads = flatten(jax.jit(grad(of_arrays))(selected, arrays))
        flat = flatten(selected)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        checked = []
        for i, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True)):
            if is_hole(leaf):
                continue

            def at(x: np.ndarray, i: int = i) -> float:
                leaves = [*flat.leaves[:i], x, *flat.leaves[i + 1 :]]
                return float(value(flat.treedef.unflatten(leaves), arrays))

            along = [*_directions(np.asarray(leaf), directions, rng)]
            compared = _compare(at, np.asarray(leaf), np.asarray(grads.leaves[i]), along, precision)
            checked.append(CheckedPath(path, compared[0], len(along), *compared[1:]))
    return GradCheck(tuple(checked), precision.name)


def _check_not_empty(selected: PyTree) -> None:
    flat = flatten(selected)
    found = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if not is_hole(x)}
    if not any(map(numel, found.values())):
        leaves = listed(f"'{path}' is {spec(x)}" for path, x in found.items())
        raise GradientError(
            "there is nothing to check, since no selected leaf has an element: "
            f"{leaves}. Select a leaf with elements."
        )


def _compare(
    at: Callable[[np.ndarray], float],
    x: np.ndarray,
    gradient: np.ndarray,
    directions: list[np.ndarray],
    precision: np.dtype,
) -> tuple[str, float, float]:
    """The verdict, and both directional derivatives where they differ most."""
    if not directions:
        return "right", 0.0, 0.0
    epsilon = float(jnp.finfo(precision).eps)
    step = epsilon ** (1 / 3) * max(1.0, float(np.sqrt(np.mean(np.abs(x) ** 2))))
    middle = at(x)

    def one(v: np.ndarray) -> tuple[str, float, float]:
        up, down = at(x + step * v), at(x - step * v)
        claimed, measured = float(np.sum(gradient * v).real), (up - down) / (2 * step)
        rounding = 8 * epsilon * max(abs(up), abs(middle), abs(down)) / step
        allowed = 2 * epsilon ** (1 / 3) * max(abs(claimed), abs(measured)) + rounding
        if abs(claimed - measured) <= allowed:
            return "right", claimed, measured
        right, left = (up - middle) / step, (middle - down) / step
        kink = abs(right - left) > 0.01 * max(abs(right), abs(left)) + 4 * rounding
        return "kink" if kink else "wrong", claimed, measured

    # One wrong direction makes the leaf wrong.
    order = ("right", "kink", "wrong")
    return max(map(one, directions), key=lambda r: (order.index(r[0]), abs(r[1] - r[2])))


def _directions(x: np.ndarray, most: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    units = (1.0, 1.0j) if np.iscomplexobj(x) else (1.0,)
    if x.size * len(units) <= most:
        for i in range(x.size):
            for unit in units:
                v = np.zeros(x.size, x.dtype)
                v[i] = unit
                yield v.reshape(x.shape)
        return
    for _ in range(most):
        v = np.sum([unit * rng.normal(size=x.shape) for unit in units], axis=0)
        yield v / np.linalg.norm(v)


def _doubled(tree: PyTree) -> PyTree:
    flat = flatten(tree)
    return flat.treedef.unflatten([_double(x) if is_array(x) else x for x in flat.leaves])


def _double(x: ArrayLike) -> ArrayLike:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return x
    wide = jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64
    return jnp.asarray(x, wide)


def _precision(closed: jex.ClosedJaxpr) -> np.dtype:
    """The lowest floating-point precision among values that depend on the inputs."""
    flat = inline(closed, [False] * len(closed.jaxpr.invars))
    reached = depending(flat.jaxpr.eqns, flat.invars)
    found = [dtype for eqn in flat.jaxpr.eqns if reads(eqn, reached) for dtype in _floats(eqn)]
    return max([np.dtype("float64"), *found], key=lambda dtype: float(jnp.finfo(dtype).eps))


def _floats(eqn: jex.JaxprEqn) -> list[np.dtype]:
    dtypes = [aval(v).dtype for v in eqn.outvars if hasattr(v.aval, "dtype")]
    return [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)] + [
        dtype for body in bodies(eqn) for inner in body.jaxpr.eqns for dtype in _floats(inner)
    ]
