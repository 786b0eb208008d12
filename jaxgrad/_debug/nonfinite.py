"""The operation that made the first NaN or infinity, found when one is there.

PyTorch's anomaly mode watches every operation of every step, and slows all of them down for the
one that fails. A pure function can be run again: the loss is traced, and its trace run operation
by operation on the values that failed. Where the loss is finite its gradient's trace follows, so
that what arises there arises in the backward pass.

Infinities are often meant (a mask of `-inf` before a softmax), so what counts is what the result
depends on: each value that is not finite carries its origin along, and one that becomes finite
again drops it.
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

from jaxgrad._autograd.grad import grad
from jaxgrad._jaxpr.inline import Inlined, inline
from jaxgrad._jaxpr.interpret import bind, interpret
from jaxgrad._jaxpr.source import whence
from jaxgrad._jaxpr.views import Cond, Scan, While, view
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import Flat, PyTree, flatten
from jaxgrad._tree.wrt import Wrt


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a loss or of its gradient, and the values that it had.

    Attributes:
        primitive: the JAX primitive, as `log`.
        source: the file, line and function that it comes from.
        scope: the Linen module or `jax.named_scope` it is in, or "".
        turns: in which turn of the loops around it, the outermost first.
        after: the paths of the parameters that were used last before it; they tell where in an
            NNX or Equinox model it is, which has no scopes.
        inputs: what it took: path or dtype and shape, and range.
        output: what it gave.
    """

    primitive: str
    source: str
    scope: str
    turns: tuple[int, ...]
    after: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str

    def __str__(self) -> str:
        where = f"{self.primitive} at {self.source}"
        where += f" in {self.scope}" if self.scope else ""
        return where + "".join(f", turn {turn}" for turn in self.turns)


@dataclasses.dataclass(frozen=True, repr=False)
class NonFinite:
    """Where a loss or its gradient stopped being finite; printed, a sentence or two.

    Attributes:
        phase: `forward`; `backward`, where the loss is finite and its gradient is not; or `input`,
            where an argument already is not.
        path: the path of that argument, or of the value that the loss closes over; else None.
        value: what it holds, or what the first operation gave.
        operation: the first operation that gave a value that is not finite, or None.
        became_nan: the operation that made a NaN of infinities, where the first gave no NaN.
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
    loss: Callable[..., Any], params: PyTree, *args: Any, wrt: Wrt = "**", **kwargs: Any
) -> NonFinite | None:
    """Returns what first made a loss or its gradient NaN or infinite, or None.

    Args:
        loss: `loss(params, *args, **kwargs)`, pure, to a scalar.
        params: any pytree; the values at which it failed, as they were before the step.
        *args: further arguments of `loss`, as the batch and the key of that step.
        wrt: which leaves of `params` are differentiated; see `select`.
        **kwargs: further arguments of `loss`.

    Returns:
        Where it arose, or None if loss and gradient are finite. The function is run operation by
        operation and not compiled, which takes longer than a step, but nothing before.

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
    """Where a value stopped being finite: at an operation, or else at an input."""

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
    """A value, its path if it is an input, its origin if it is not finite.

    Attributes:
        x: the value.
        path: of an input.
        origin: None where all of `x` is finite.
        after: the parameters that were used last.
        of_params: whether it was computed from parameters and literals alone.
    """

    x: Any
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


def _input(x: Any, path: str, params: str) -> _Value:
    origin = None if _finite(x) else _Origin(path, _describe(x), None, _has_nan(x))
    of_params = path == params or path.startswith(f"{params}/")
    return _Value(x, path, origin, (path,) if of_params else (), of_params)


def _value(x: Any) -> _Value:
    return x if isinstance(x, _Value) else _Value(x, of_params=True)  # a literal


def _worst(origins: Iterable[_Origin | None]) -> _Origin | None:
    """A NaN before an infinity, the first of each."""
    found = [origin for origin in origins if origin is not None]
    return next((o for o in found if o.nan), found[0] if found else None)


def _run(
    program: Inlined,
    params: str,
    args: Sequence[_Value],
    scope: str,
    turns: tuple[int, ...],
) -> list[_Value]:
    """Runs equations one by one; what is not finite learns where that comes from."""
    consts = [_input(x, f"closed over/{i}", params) for i, x in enumerate(program.consts)]

    def equation(eqn: jex.JaxprEqn, values: Sequence[Any]) -> list[_Value]:
        values = [_value(v) for v in values]
        after, of_params = _after(values)
        outs = [_Value(x, None, None, after, of_params) for x in bind(eqn, [v.x for v in values])]
        bad = [i for i, out in enumerate(outs) if not _finite(out.x)]
        if not bad:
            return outs
        source, inner = whence(eqn)
        inner = "/".join(part for part in (scope, _plain(inner)) if part)
        origins = _inside(eqn, values, bad, inner, turns)
        for i in bad:
            operation = Operation(
                eqn.primitive.name,
                source,
                inner,
                turns,
                after,
                tuple(map(str, values)),
                str(outs[i]),
            )
            origin = origins.get(i) or _origin(operation, values, outs[i].x)
            outs[i] = dataclasses.replace(outs[i], origin=origin)
        return outs

    open_program = jex.ClosedJaxpr(program.jaxpr, [])
    return [_value(out) for out in interpret(open_program, [*consts, *args], equation)]


def _origin(operation: Operation, values: Sequence[_Value], x: Any) -> _Origin:
    before, nan = _worst(v.origin for v in values), _has_nan(x)
    if before is None:
        return _Origin(None, operation.output, operation, nan)
    if nan and not before.nan:
        return dataclasses.replace(before, nan=True, became_nan=operation)
    return before


def _after(values: Sequence[_Value]) -> tuple[tuple[str, ...], bool]:
    """The parameters that an operation's output comes after, and whether there is nothing else."""
    direct = [path for v in values if v.of_params for path in v.after]
    earlier = [path for v in values for path in v.after]
    return tuple(dict.fromkeys(direct or earlier)), all(v.of_params for v in values)


def _inside(
    eqn: jex.JaxprEqn,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    turns: tuple[int, ...],
) -> dict[int, _Origin]:
    """The origins of an equation's outputs within its own program, where it has one."""
    match view(eqn):
        case Scan() as scan:
            return _scan(scan, values, bad, scope, turns)
        case While() as loop:
            return _while(loop, values, bad, scope, turns)
        case Cond(branches):
            which, *operands = values
            branch = branches[int(np.clip(which.x, 0, len(branches) - 1))]
            outs = _body(branch, operands, scope, turns)
            return {i: origin for i in bad if (origin := outs[i].origin)}
    return {}


def _scan(
    scan: Scan,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    turns: tuple[int, ...],
) -> dict[int, _Origin]:
    consts, carry, stacks = scan.parts(values)
    order = range(scan.length)

    def slices(i: int) -> list[_Value]:
        return [_again(v, v.x[i]) for v in stacks]

    origins: dict[int, _Origin] = {}
    run = jax.jit(jex.jaxpr_as_fun(scan.body))
    for i in reversed(order) if scan.reverse else order:
        outs = _turn(run, scan.body, [*consts, *carry, *slices(i)], scope, (*turns, i))
        carry = outs[: scan.carries]
        if _collect(origins, outs, bad):
            break
    return origins


def _while(
    loop: While,
    values: Sequence[_Value],
    bad: Sequence[int],
    scope: str,
    turns: tuple[int, ...],
) -> dict[int, _Origin]:
    (of_test, consts, carry), i = loop.parts(values), 0
    goes_on = jax.jit(jex.jaxpr_as_fun(loop.test))
    origins: dict[int, _Origin] = {}
    run = jax.jit(jex.jaxpr_as_fun(loop.body))
    while goes_on(*(v.x for v in [*of_test, *carry]))[0]:
        carry = _turn(run, loop.body, [*consts, *carry], scope, (*turns, i))
        i += 1
        if _collect(origins, carry, bad):
            break
    return origins


def _turn(
    run: Callable[..., Any],
    body: jex.ClosedJaxpr,
    values: Sequence[_Value],
    scope: str,
    turns: tuple[int, ...],
) -> list[_Value]:
    """One turn of a loop: whole where that is finite, as most turns are, else step by step."""
    outs = run(*(v.x for v in values))
    if all(map(_finite, outs)):
        after, _ = _after(values)
        return [_Value(x, after=after) for x in outs]
    return _body(body, values, scope, turns)


def _body(
    body: jex.ClosedJaxpr, values: Sequence[_Value], scope: str, turns: tuple[int, ...]
) -> list[_Value]:
    return _run(inline(body, [False] * len(values)), "", values, scope, turns)


def _collect(origins: dict[int, _Origin], outs: Sequence[_Value], bad: Sequence[int]) -> bool:
    """Takes the origins of a turn's outputs, and says whether all that were asked for are known."""
    for i in bad:
        if origin := outs[i].origin:
            origins.setdefault(i, origin)
    return len(origins) == len(bad)


def _again(value: _Value, x: Any) -> _Value:
    origin = value.origin if value.origin is not None and not _finite(x) else None
    return dataclasses.replace(value, x=x, origin=origin)


def _plain(scope: str) -> str:
    """A name stack without the transformations: `transpose(jvp(net))/head` is `net/head`."""
    return "/".join(part for part in re.sub(r"\w+\(|\)", "", scope).split("/") if part)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _finite(x: Any) -> bool:
    return not _is_inexact(x) or bool(jnp.isfinite(x).all())


def _has_nan(x: Any) -> bool:
    return _is_inexact(x) and bool(jnp.isnan(x).any())


def _describe(x: Any) -> str:
    if not _is_inexact(x) or not np.size(x):
        return spec(x)
    numbers = np.asarray(x)
    if numbers.dtype.itemsize < 4:
        numbers = numbers.astype(np.float32)
    bad = ~np.isfinite(numbers)
    if bad.any():
        kinds = {str(v) for v in np.unique(numbers[bad])}
        where = [int(d) for d in np.argwhere(bad)[0]]
        first = f", the first at {where}" if where else ""
        return f"{spec(x)}, {bad.sum()} of {bad.size} {' or '.join(sorted(kinds))}{first}"
    if np.iscomplexobj(numbers):
        return spec(x)
    low, high = numbers.min(), numbers.max()
    return f"{spec(x)} from {low:.3g} to {high:.3g}" if low != high else f"{spec(x)}, {low:.3g}"
