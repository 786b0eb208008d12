"""The gradient of a value in the middle of a function.

A tap is an equation that carries a name and does nothing: it lowers to nothing, so a loss full of
taps computes what it does without them. When the gradients of the taps are requested, the loss is
traced, and run from its trace with one more input for each tap. This input is added to the tapped
value *in the tangents only* (its own value is never read), so the forward pass stays the same bit
for bit, and the gradient in the input is the cotangent of the value.

Flax's `perturb` needs the same inputs by hand: a collection that the user initialises, passes and
differentiates. Here the trace has all that is needed to make them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend import source_info_util
from jax.interpreters import ad, batching, mlir

from jaxgrad._jaxpr.interpret import Values, bind, interpret
from jaxgrad._jaxpr.source import whence
from jaxgrad._jaxpr.views import Call, Checkpoint, Cond, CustomRule, Scan, bodies, view
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import PyTree, is_array

T = TypeVar("T")

source_info_util.register_exclusion(__file__)  # the line of a tap is the user's


class TapError(ValueError):
    """A tap whose gradient can't be computed: the message names it and says why."""

    __module__ = "jaxgrad"


def tap(x: T, name: str) -> T:
    """Names a value inside a function, so that its gradient can be requested.

    Args:
        x: an array, or a pytree of arrays.
        name: unique within the function that is differentiated.

    Returns:
        `x`. Nothing is computed for it until `value_and_grad(..., taps=True)` returns the
        cotangents of all taps by name: each of the structure, shapes and dtypes of `x`, with
        `None` for leaves that are not floats. `scan` stacks them along a new first axis, as does
        `vmap` for a value that it maps; a value shared by all examples has one cotangent, their
        sum. In a `cond` a name may occur once in each branch, with one shape; if the branch that
        has it does not run, its cotangent is zero.

    Raises:
        TapError: no leaf of `x` is a float. And from `value_and_grad(..., taps=True)`: a name
            occurs twice, or a tap is in a `while_loop`, a `shard_map` or a function with a custom
            derivative.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, x):
        ...     hidden = jg.tap(jnp.tanh(x @ params["trunk"]), "hidden")
        ...     return jnp.sum(hidden @ params["head"])
        >>> params = {"head": jnp.array([2.0, 3.0]), "trunk": jnp.ones((4, 2))}
        >>> x = jnp.ones((1, 4))
        >>> value, (grads, taps) = jg.value_and_grad(loss, taps=True)(params, x)
        >>> print(taps["hidden"])
        [[2. 3.]]

    Source: `Tensor.retain_grad`; `flax.linen.Module.perturb`.
    """
    leaves, tree, rebuild = floats(x)
    if not leaves:
        whole = jax.tree.leaves(x)
        what = spec(whole[0]) if len(whole) == 1 else f"a tree of {len(whole)} leaves"
        raise TapError(
            f"tap '{name}' is on {what}, which is not a float and has no gradient: tap a float "
            "that it is computed from, or that is computed from it."
        )
    return rebuild(tap_p.bind(*leaves, name=name, tree=tree, mapped=((),) * len(leaves)))


def floats(tree: T) -> tuple[list[jax.Array], Any, Callable[[Sequence[Any]], T]]:
    """The leaves that have gradients, the tree of their cotangents, and how to rebuild `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    found = [
        i
        for i, x in enumerate(leaves)
        if is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]

    def rebuild(new: Sequence[Any]) -> T:
        changed = dict(zip(found, new, strict=True))
        return treedef.unflatten([changed.get(i, x) for i, x in enumerate(leaves)])

    holes = treedef.unflatten([i if i in set(found) else None for i in range(len(leaves))])
    return [jnp.asarray(leaves[i]) for i in found], jax.tree.structure(holes), rebuild


# `mapped` has for each leaf the axes that `vmap` has added to it, the outermost first.
tap_p = jex.Primitive("jaxgrad_tap")
tap_p.multiple_results = True


@tap_p.def_impl
def _impl(*leaves: Any, **_: Any) -> list[Any]:
    return list(leaves)


@tap_p.def_abstract_eval
def _abstract_eval(*avals: Any, **_: Any) -> list[Any]:
    return list(avals)


def _jvp(primals: Values, tangents: Values, **params: Any) -> tuple[Values, Values]:
    return tap_p.bind(*primals, **params), tangents


def _batch(
    leaves: Values, axes: Values, *, name: str, tree: Any, mapped: tuple[tuple[int, ...], ...]
) -> tuple[Values, Values]:
    mapped = tuple(
        inner if axis is None else (axis, *(a + (a >= axis) for a in inner))
        for axis, inner in zip(axes, mapped, strict=True)
    )
    return tap_p.bind(*leaves, name=name, tree=tree, mapped=mapped), axes


ad.primitive_jvps[tap_p] = _jvp
batching.primitive_batchers[tap_p] = _batch
mlir.register_lowering(tap_p, lambda ctx, *leaves, **_: leaves)


def value_and_grads_of_taps(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.value_and_grad(fun, has_aux=True)`, with the cotangents of the taps beside `aux`.

    Args:
        fun: `fun(params, *args)` to `(scalar, aux)`, differentiated in `params`.

    Returns:
        A function to `((scalar, (aux, taps)), grads)`.
    """

    def wrapped(params: PyTree, *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(lambda p: fun(p, *args), return_shape=True)(params)
        sites = _sites(closed)
        if not sites:
            raise TapError(
                "taps=True, but the loss has no tap: name the values whose gradients you want, "
                "h = jaxgrad.tap(h, 'hidden'), and use what it returns."
            )

        def moved(params: PyTree, moves: Mapping[str, Values]) -> Any:
            outs = _run(closed, jax.tree.leaves(params), moves)
            return jax.tree.unflatten(jax.tree.structure(shape), outs)

        still = {name: site.zeros() for name, site in sites.items()}
        (value, aux), (grads, taps) = jax.value_and_grad(moved, (0, 1), has_aux=True)(params, still)
        taps = {name: sites[name].tree.unflatten(leaves) for name, leaves in taps.items()}
        return (value, (aux, taps)), grads

    return wrapped


@dataclasses.dataclass(frozen=True)
class _Site:
    """Where a tap is, and what its cotangent looks like.

    Attributes:
        source: the line.
        tree: the structure of the tapped value.
        avals: the types of its leaves, in one iteration of the loops around it.
        mapped: see `tap_p`.
        turns: the lengths of the scans around it, the outermost first.
        again: whether it is in what a checkpoint recomputes, for a gradient within `fun`.
    """

    source: str
    tree: Any
    avals: tuple[Any, ...]
    mapped: tuple[tuple[int, ...], ...]
    turns: tuple[int, ...] = ()
    again: bool = False

    def like(self, other: "_Site") -> bool:
        """Whether both are taps of one shape."""
        return dataclasses.replace(self, source=other.source, again=other.again) == other

    def zeros(self) -> list[jax.Array]:
        zeros = [
            _mapped_first(ad.zeros_like_aval(aval), axes)
            for aval, axes in zip(self.avals, self.mapped, strict=True)
        ]
        return [jnp.broadcast_to(zero, self.turns + zero.shape) for zero in zeros]

    def __str__(self) -> str:
        turns = f"{list(self.turns)} times " if self.turns else ""
        return f"{turns}{listed(map(spec, self.avals))} at {self.source}"


def _mapped_first(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(x, axes, range(len(axes)))


@jax.custom_jvp
def _moved(x: jax.Array, move: jax.Array) -> jax.Array:
    # Not x + 0, which would turn -0.0 into 0.0.
    return x


@_moved.defjvp
def _(primals: Values, tangents: Values) -> tuple[Any, Any]:
    return primals[0], tangents[0] + tangents[1]


_REASONS = {
    "while": "has no gradient: use a scan, or a fori_loop whose number of iterations is not an "
    "array",
    "custom_jvp_call": "has a custom derivative, which does not pass through the tap: "
    "tap what goes into the function, or what it returns",
    "shard_map": "runs on each device separately: tap what goes into it, or what it returns",
}
_REASONS["custom_vjp_call"] = _REASONS["custom_jvp_call"]


def _sites(program: jex.ClosedJaxpr) -> dict[str, _Site]:
    """The taps of a function by name, in order."""
    sites: dict[str, _Site] = {}
    for eqn in program.jaxpr.eqns:
        for name, site in _sites_of(eqn).items():
            first = sites.setdefault(name, site)
            # A recomputed value is the same value, and contributes to the same cotangent.
            if first is not site and not ((first.again or site.again) and first.like(site)):
                raise TapError(
                    f"tap '{name}' occurs twice: at {first.source}, and at {site.source}. "
                    f"Each needs its own name, such as tap(h, f'{name}/{{i}}') in a Python loop."
                )
    return sites


def _sites_of(eqn: jex.JaxprEqn) -> dict[str, _Site]:
    if eqn.primitive is tap_p:
        params, avals = eqn.params, tuple(v.aval for v in eqn.outvars)
        source, scope = whence(eqn)
        source += f" in {scope}" if scope else ""
        return {params["name"]: _Site(source, params["tree"], avals, params["mapped"])}
    known = view(eqn)
    if isinstance(known, Cond):
        return _sites_of_branches(known)
    sites = {name: site for body in bodies(eqn) for name, site in _sites(body).items()}
    match known:
        case Scan(length=length):
            turns = (length,)
            return {n: dataclasses.replace(s, turns=turns + s.turns) for n, s in sites.items()}
        case Checkpoint(differentiated=True):
            return {n: dataclasses.replace(s, again=True) for n, s in sites.items()}
    if sites and (isinstance(known, CustomRule) or not isinstance(known, Call)):
        name = eqn.primitive.name
        raise TapError(
            f"tap {listed(map(repr, sites))} is in the {name} at {whence(eqn)[0]}, which "
            f"{_REASONS.get(name, 'is not a call that jaxgrad can look into')}."
        )
    return sites


def _sites_of_branches(cond: Cond) -> dict[str, _Site]:
    """Only one branch runs, so taps of the same name are one tap."""
    sites: dict[str, _Site] = {}
    for branch in cond.branches:
        for name, site in _sites(branch).items():
            other = sites.setdefault(name, site)
            if not other.like(site):
                raise TapError(
                    f"tap '{name}' differs between the branches of a cond: {other}, and {site}. "
                    "Give each a name of its own."
                )
    return sites


def _run(program: jex.ClosedJaxpr, args: Values, moves: Mapping[str, Values]) -> list[jax.Array]:
    """Runs a function, with the tangents of `moves` added at its taps."""

    def equation(eqn: jex.JaxprEqn, values: Values) -> Values:
        mine = {name: moves[name] for name in _sites_of(eqn)}
        if not mine:
            return bind(eqn, values)
        if eqn.primitive is tap_p:
            return _move(eqn, values, *mine.values())
        match view(eqn):
            case Scan() as scan:
                return _scan(scan, values, mine)
            case Cond() as cond:
                return _cond(cond, values, mine)
            case Checkpoint(body, policy, prevent_cse):
                run = jax.checkpoint(
                    lambda values, mine: _run(body, values, mine),
                    policy=policy,
                    prevent_cse=prevent_cse,
                )
                return run(values, mine)
            case Call(body):
                return _run(body, values, mine)
        raise AssertionError(f"a tap in a {eqn.primitive.name}")  # `_sites_of` has refused it

    return interpret(program, args, equation)


def _move(eqn: jex.JaxprEqn, values: Values, moves: Values) -> Values:
    return [
        _moved(x, jnp.moveaxis(move, range(len(axes)), axes))
        for x, move, axes in zip(values, moves, eqn.params["mapped"], strict=True)
    ]


def _scan(scan: Scan, values: Values, moves: Mapping[str, Values]) -> Values:
    consts, carry, xs = scan.parts(values)

    def turn(carry: Values, x: tuple[Values, Mapping[str, Values]]) -> tuple[Values, Values]:
        xs, moves = x
        outs = _run(scan.body, [*consts, *carry, *xs], moves)
        return outs[: scan.carries], outs[scan.carries :]

    carry, ys = jax.lax.scan(
        turn,
        carry,
        (xs, moves),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    return [*carry, *ys]


def _cond(cond: Cond, values: Values, moves: Mapping[str, Values]) -> Values:
    def run(branch: jex.ClosedJaxpr) -> Callable[..., Values]:
        return lambda values, moves: _run(branch, values, {n: moves[n] for n in _sites(branch)})

    which, *operands = values
    return jax.lax.switch(which, [*map(run, cond.branches)], operands, moves)
