"""Finds the operation that made the first NaN or infinity, after a step has failed.

PyTorch's anomaly mode watches every operation of every step, and slows all of them down for the
one that fails. A pure function can be run again: the loss is traced, and the trace is run operation
by operation on the values that failed. If the loss is finite, the trace of its gradient follows,
and what arises there arises in the backward pass.

Infinities are often intended (a mask of `-inf` before a softmax), so only those that the result
depends on count: a value that is not finite carries its origin along, and drops it once it is
finite again.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.typing import ArrayLike

from jaxgrad._autograd.grad import grad
from jaxgrad._jaxpr.inline import Inlined, inline
from jaxgrad._jaxpr.interpret import bind, interpret
from jaxgrad._jaxpr.source import whence
from jaxgrad._jaxpr.views import Cond, Scan, While, view
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import Flat, PyTree, flatten
from jaxgrad._tree.pattern import is_within
from jaxgrad._tree.types import Loss, Params
from jaxgrad._tree.wrt import Wrt


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a loss or of its gradient, with its values.

    Attributes:
        primitive: the JAX primitive, such as `log`.
        source: the file, line and function that it comes from.
        scope: its Linen module or `jax.named_scope`, or "".
        iterations: the iteration of each loop around it, the outermost first.
        after: the paths of the parameters used last before it. They locate it in NNX and Equinox
            models, which have no scopes.
        inputs: the path, or dtype and shape, and the range of each input.
        output: the same for its output.
    """

    primitive: str
    source: str
    scope: str
    iterations: tuple[int, ...]
    after: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str

    def __str__(self) -> str:
        where = f"{self.primitive} at {self.source}"
        where += f" in {self.scope}" if self.scope else ""
        return where + "".join(f", iteration {i}" for i in self.iterations)


@dataclasses.dataclass(frozen=True, repr=False)
class NonFinite:
    """Where a loss or its gradient stopped being finite. Its repr is a short report.

    Attributes:
        phase: `forward`; `backward` if the loss is finite and its gradient is not; `input` if an
            argument is not finite.
        path: the path of that argument, or of a value that the loss closes over; else None.
        value: a description of that argument, or of the first operation's output.
        operation: the first operation whose output is not finite, or None.
        became_nan: the operation that turned an infinity into the first NaN, or None.
    """

    phase: str
    path: str | None
    value: str
    operation: Operation | None
    became_nan: Operation | None

    def __repr__(self) -> str:
        if self.operation is None:
            lines = [f"input: {self.path} is {self.value}"]
        else:
            lines = [f"{self.phase}: {self.operation} gives {self.value}"]
            lines += [f"  from {given}" for given in self.operation.inputs]
            if self.operation.after:
                lines.append(f"  after {listed(self.operation.after, 3)}")
        if self.became_nan is not None:
            lines.append(f"  which becomes NaN in {self.became_nan}")
        return "\n".join(lines)


def find_nonfinite(
    loss: Loss, params: Params, *args: PyTree, wrt: Wrt = "**", **kwargs: PyTree
) -> NonFinite | None:
    """Finds the first operation that made a loss or its gradient NaN or infinite.

    Args:
        loss: a pure function, `loss(params, *args, **kwargs)`, that returns a scalar.
        params: any pytree, with the values from before the step that failed.
        *args: further arguments of `loss`, such as the batch and the key of that step.
        wrt: the leaves of `params` to differentiate; see `select`.
        **kwargs: further arguments of `loss`.

    Returns:
        The operation or the argument that it arose from, or None if loss and gradient are finite.
        Operations run one by one, uncompiled: the search takes longer than a step, but costs
        nothing until a step fails.

    Raises:
        SelectionError: see `value_and_grad`.
        GradientError: see `value_and_grad`.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, batch):
        ...     with jax.named_scope("distance"):
        ...         return jnp.sum(jnp.sqrt((batch["x"] - params["center"]) ** 2))
        >>> params, batch = {"center": jnp.zeros(2)}, {"x": jnp.array([1.0, 0.0])}
        >>> found = jg.find_nonfinite(loss, params, batch)  # sqrt has no slope at 0
        >>> found.phase, found.operation.primitive, found.operation.scope
        ('backward', 'div', 'distance')
        >>> jg.find_nonfinite(loss, params, {"x": jnp.array([1.0, jnp.inf])})
        input: batch/x is float32[2], 1 of 2 inf, the first at [1]

    Source: `torch.autograd.set_detect_anomaly`.
    """
    call = inspect.signature(loss).bind(params, *args, **kwargs)
    flat = flatten(dict(call.arguments))
    first = next(iter(call.arguments))
    with jax.debug_nans(False), jax.debug_infs(False):
        for phase, fun in (("forward", loss), ("backward", grad(loss, wrt))):

            def of_arrays(arrays: dict[int, jax.Array], fun: Callable[..., Any] = fun) -> Any:
                leaves = [arrays.get(i, leaf) for i, leaf in enumerate(flat.leaves)]
                filled = inspect.BoundArguments(call.signature, flat.treedef.unflatten(leaves))
                return fun(*filled.args, **filled.kwargs)

            if origin := _first_origin(of_arrays, flat, first):
                return origin.report(phase)
    return None


@dataclasses.dataclass(frozen=True)
class _Origin:
    """The operation, or else the input, at which a value stopped being finite."""

    path: str | None
    value: str
    operation: Operation | None
    nan: bool
    became_nan: Operation | None = None

    def report(self, phase: str) -> NonFinite:
        phase = phase if self.operation else "input"
        return NonFinite(phase, self.path, self.value, self.operation, self.became_nan)


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value with its history.

    Attributes:
        x: the value.
        path: its path, if it is an input.
        origin: None if all of `x` is finite.
        after: the parameters used last.
        of_params: whether it was computed from parameters and literals alone.
    """

    x: ArrayLike
    path: str | None = None
    origin: _Origin | None = None
    after: tuple[str, ...] = ()
    of_params: bool = False

    def __str__(self) -> str:
        return f"{self.path}, {_describe(self.x)}" if self.path else _describe(self.x)


def _first_origin(fun: Callable[..., Any], flat: Flat, params: str) -> _Origin | None:
    arrays = {i: leaf for i, leaf in enumerate(flat.leaves) if hasattr(leaf, "dtype")}
    program = inline(jax.make_jaxpr(fun)(arrays), [False] * len(arrays))
    inputs = [_input(x, flat.paths[i], params) for i, x in arrays.items()]
    outs = _run(program, params, inputs, "", ())
    return _worst(out.origin for out in map(_value, outs))


def _input(x: ArrayLike, path: str, params: str) -> _Value:
    origin = None if _finite(x) else _Origin(path, _describe(x), None, _has_nan(x))
    of_params = is_within(path, params)
    return _Value(x, path, origin, (path,) if of_params else (), of_params)


def _value(x: _Value | ArrayLike) -> _Value:
    return x if isinstance(x, _Value) else _Value(x, of_params=True)  # a literal


def _worst(origins: Iterable[_Origin | None]) -> _Origin | None:
    """The first NaN, or else the first infinity."""
    found = [origin for origin in origins if origin is not None]
    return next((o for o in found if o.nan), found[0] if found else None)


def _run(
    program: Inlined,
    params: str,
    args: Sequence[_Value],
    scope: str,
    iterations: tuple[int, ...],
) -> list[_Value]:
    """Runs equations one by one, and notes the origin of values that are not finite."""
    consts = [_input(x, f"closed over/{i}", params) for i, x in enumerate(program.consts)]

    def equation(eqn: jex.JaxprEqn, read: Sequence[_Value | ArrayLike]) -> list[_Value]:
        values = [_value(v) for v in read]
        after, of_params = _after(values)
        outs = [_Value(x, None, None, after, of_params) for x in bind(eqn, [v.x for v in values])]
        bad = [i for i, out in enumerate(outs) if not _finite(out.x)]
        if not bad:
            return outs
        source, inner = whence(eqn)
        inner = "/".join(part for part in (scope, _plain(inner)) if part)
        origins = _inside(eqn, values, bad, inner, iterations)
        for i in bad:
            operation = Operation(
                eqn.primitive.name,
                source,
                inner,
                iterations,
                after,
                tuple(map(str, values)),
                str(outs[i]),
            )
            origin = origins.get(i) or _origin(operation, values, outs[i].x)
            outs[i] = dataclasses.replace(outs[i], origin=origin)
        return outs

    open_program = jex.ClosedJaxpr(program.jaxpr, [])
    return [_value(out) for out in interpret(open_program, [*consts, *args], equation)]


def _origin(operation: Operation, values: Sequence[_Value], x: ArrayLike) -> _Origin:
    before, nan = _worst(v.origin for v in values), _has_nan(x)
    if before is None:
        return _Origin(None, operation.output, operation, nan)
    if nan and not before.nan:
        return dataclasses.replace(before, nan=True, became_nan=operation)
    return before


def _after(values: Sequence[_Value]) -> tuple[tuple[str, ...], bool]:
    """The parameters used last before an operation, and whether it reads nothing but parameters."""
    direct = [path for v in values if v.of_params for path in v.after]
    earlier = [path for v in values for path in v.after]
    return tuple(dict.fromkeys(direct or earlier)), all(v.of_params for v in values)


def _inside(
    eqn: jex.JaxprEqn,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    iterations: tuple[int, ...],
) -> dict[int, _Origin]:
    """The origins of an equation's outputs within its own program, if it has one."""
    match view(eqn):
        case Scan() as scan:
            return _scan(scan, values, bad, scope, iterations)
        case While() as loop:
            return _while(loop, values, bad, scope, iterations)
        case Cond(branches):
            which, *operands = values
            branch = branches[int(np.clip(which.x, 0, len(branches) - 1))]
            outs = _body(branch, operands, scope, iterations)
            return {i: origin for i in bad if (origin := outs[i].origin)}
    return {}


def _scan(
    scan: Scan,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    iterations: tuple[int, ...],
) -> dict[int, _Origin]:
    consts, carry, stacks = scan.parts(values)
    order = range(scan.length)

    def slices(i: int) -> list[_Value]:
        return [_again(v, jnp.asarray(v.x)[i]) for v in stacks]

    origins: dict[int, _Origin] = {}
    run = jax.jit(jex.jaxpr_as_fun(scan.body))
    for i in reversed(order) if scan.reverse else order:
        outs = _iteration(run, scan.body, [*consts, *carry, *slices(i)], scope, (*iterations, i))
        carry = outs[: scan.carries]
        if _collect(origins, outs, bad):
            break
    return origins


def _while(
    loop: While,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    iterations: tuple[int, ...],
) -> dict[int, _Origin]:
    (of_test, consts, carry), i = loop.parts(values), 0
    goes_on = jax.jit(jex.jaxpr_as_fun(loop.test))
    origins: dict[int, _Origin] = {}
    run = jax.jit(jex.jaxpr_as_fun(loop.body))
    while goes_on(*(v.x for v in [*of_test, *carry]))[0]:
        carry = _iteration(run, loop.body, [*consts, *carry], scope, (*iterations, i))
        i += 1
        if _collect(origins, carry, bad):
            break
    return origins


def _iteration(
    run: Callable[..., Any],
    body: jex.ClosedJaxpr,
    values: Sequence[_Value],
    scope: str,
    iterations: tuple[int, ...],
) -> list[_Value]:
    """Runs an iteration of a loop compiled, and again step by step if a result is not finite."""
    outs = run(*(v.x for v in values))
    if all(map(_finite, outs)):
        after, _ = _after(values)
        return [_Value(x, after=after) for x in outs]
    return _body(body, values, scope, iterations)


def _body(
    body: jex.ClosedJaxpr, values: Sequence[_Value], scope: str, iterations: tuple[int, ...]
) -> list[_Value]:
    return _run(inline(body, [False] * len(values)), "", values, scope, iterations)


def _collect(origins: dict[int, _Origin], outs: Sequence[_Value], bad: Sequence[int]) -> bool:
    """Adds the origins of an iteration's outputs, and returns whether all wanted ones are known."""
    for i in bad:
        if origin := outs[i].origin:
            origins.setdefault(i, origin)
    return len(origins) == len(bad)


def _again(value: _Value, x: ArrayLike) -> _Value:
    origin = value.origin if value.origin is not None and not _finite(x) else None
    return dataclasses.replace(value, x=x, origin=origin)


def _plain(scope: str) -> str:
    """A name stack without the transformations: `transpose(jvp(net))/head` is `net/head`."""
    return "/".join(part for part in re.sub(r"\w+\(|\)", "", scope).split("/") if part)


def _is_inexact(x: ArrayLike) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _finite(x: ArrayLike) -> bool:
    return not _is_inexact(x) or bool(jnp.isfinite(x).all())


def _has_nan(x: ArrayLike) -> bool:
    return _is_inexact(x) and bool(jnp.isnan(x).any())


def _describe(x: ArrayLike) -> str:
    if not _is_inexact(x) or not np.size(x):
        return spec(x)
    values = np.asarray(x)
    if values.dtype.itemsize < 4:
        values = values.astype(np.float32)
    bad = ~np.isfinite(values)
    if bad.any():
        kinds = {str(v) for v in np.unique(values[bad])}
        where = [int(d) for d in np.argwhere(bad)[0]]
        first = f", the first at {where}" if where else ""
        return f"{spec(x)}, {bad.sum()} of {bad.size} {' or '.join(sorted(kinds))}{first}"
    if np.iscomplexobj(values):
        return spec(x)
    low, high = values.min(), values.max()
    return f"{spec(x)} from {low:.3g} to {high:.3g}" if low != high else f"{spec(x)}, {low:.3g}"
