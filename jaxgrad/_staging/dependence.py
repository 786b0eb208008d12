"""What each value of a traced loss depends on: parameters, one example, or more than that.

The loss is traced at two batch sizes. The two jaxprs have the same equations: a size that
differs between them scales with the batch, and a literal or parameter that differs means that the
computation uses the batch size itself. Two concrete sizes are used rather than a symbolic one
(`jax.export.symbolic_shape`) since every function accepts them, and since the loss is traced
anew for each size it is called with anyway. Each such trace is compared with the first, so a
function that computes something else at some size is caught when that size is used.

Shapes only show where the batch *may* be. `batch_axis.py` proves equation by equation that a value
is per example.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxgrad._jaxpr.source import Atom, shape, whence
from jaxgrad._jaxpr.views import Call, Cond, Scan, ShardMap, View, While, view
from jaxgrad._staging.batch_axis import (
    LEFT_OUT,
    NEVER_CONSTANT,
    RULES,
    Dim,
    Mixes,
    Shape,
    Step,
    follow,
)
from jaxgrad._staging.two_traces import (
    SIZES,
    Misaligned,
    Sizes,
    align,
    equal,
    unify,
    uses_batch_size,
)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Computed from frozen parameters alone: the same for every example and every step."""


@dataclasses.dataclass(frozen=True)
class PerExample:
    """Computed from frozen parameters and one example.

    Attributes:
        axis: the axis that counts the examples.
        inner: how many consecutive entries of it belong to one example.
    """

    axis: int
    inner: int = 1

    def rows_first(self, x: jax.Array) -> jax.Array:
        """The array with one leading entry per example, as it is stored."""
        x = jnp.moveaxis(x, self.axis, 0)
        return x if self.inner == 1 else x.reshape(-1, self.inner, *x.shape[1:])

    def restored(self, x: jax.Array) -> jax.Array:
        """The array as the equations have it, from its rows."""
        x = x if self.inner == 1 else x.reshape(-1, *x.shape[2:])
        return jnp.moveaxis(x, 0, self.axis)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why an equation with frozen inputs only can't be computed once per example.

    Attributes:
        reason: what it does.
        primitive: the JAX primitive.
        source: its file and line.
        scope: the Flax module or `jax.named_scope`, if there is one.
    """

    reason: str
    primitive: str
    source: str
    scope: str

    def __str__(self) -> str:
        scope = f" in {self.scope}" if self.scope else ""
        return f"{self.primitive} at {self.source}{scope} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Varying:
    """Changes from step to step, or depends on an equation that was refused."""

    because: Refusal | None = None


Place: TypeAlias = Constant | PerExample | Varying


@dataclasses.dataclass(frozen=True)
class Classes:
    """The class of every value, and the equations that were refused."""

    places: dict[jex.Var, Place]
    refusals: dict[Refusal, int]

    def __getitem__(self, atom: Atom) -> Place:
        return Constant() if isinstance(atom, jex.Literal) else self.places[atom]


def classify(
    first: jex.Jaxpr,
    second: jex.Jaxpr,
    sizes: Sizes,
    inputs: Sequence[Place],
) -> Classes:
    """Finds what each value of `first` depends on.

    Args:
        first: the function traced at the first batch size.
        second: the same at the second.
        sizes: the two batch sizes.
        inputs: the classes of the inputs.

    Raises:
        Misaligned: the traces are not the same equations.
    """
    align(first, second)
    classes = Classes({v: Constant() for v in first.constvars}, {})
    classes.places.update(zip(first.invars, inputs, strict=True))
    for i, pair in enumerate(zip(first.eqns, second.eqns, strict=True)):
        places = [classes[v] for v in pair[0].invars]
        blocked = [p for p in places if isinstance(p, Varying)]
        if blocked:
            # A value that a step changes varies for good; one behind a refusal has a reason.
            mine = min(blocked, key=lambda p: p.because is not None)
            outs: Sequence[Place] = [mine] * len(pair[0].outvars)
        else:
            try:
                outs = _outputs(*pair, sizes, places)
            except (Mixes, Misaligned) as mixes:
                refusal = Refusal(str(mixes), pair[0].primitive.name, *whence(pair[0]))
                classes.refusals[refusal] = i
                outs = [Varying(refusal)] * len(pair[0].outvars)
        classes.places.update(zip(pair[0].outvars, outs, strict=True))
    return classes


def _outputs(
    a: jex.JaxprEqn, b: jex.JaxprEqn, sizes: Sizes, places: Sequence[Place]
) -> Sequence[Place]:
    name = a.primitive.name
    if name in NEVER_CONSTANT:
        raise Mixes(LEFT_OUT[name])
    if a.effects or b.effects:
        raise Mixes("has a side effect, which must happen in every step")
    axes = [p.axis if isinstance(p, PerExample) else None for p in places]
    ours, theirs = view(a), view(b)
    if any(axis is not None for axis in axes) and ours is None and name not in RULES:
        raise Mixes(LEFT_OUT.get(name, "has no rule for the rows of a batch"))
    params = dict(a.params)
    for size in SIZES.get(name, ()):
        params[size] = unify(a.params[size], b.params[size], sizes)
    scan_over_batch = (
        isinstance(ours, Scan) and isinstance(theirs, Scan) and ours.length != theirs.length
    )
    # The length of a scan over the batch is rightly the batch size.
    one, other = (
        v.lengthless(e) if isinstance(v, Scan) else e for e, v in ((a, ours), (b, theirs))
    )
    if uses_batch_size(one, other, sizes):
        raise Mixes("depends on the size of the batch")
    ins, outs = (
        [unify(shape(x), shape(y), sizes) for x, y in zip(xs, ys, strict=True)]
        for xs, ys in ((a.invars, b.invars), (a.outvars, b.outvars))
    )
    if all(axis is None for axis in axes):
        if scan_over_batch or any(isinstance(d, Dim) for out in outs for d in out):
            return _made_for_batch(a, params, outs)
        return [Constant()] * len(outs)
    if ours is not None:
        return _structured(ours, theirs, sizes, places, outs)
    return _places(follow(name, Step(params, axes, ins, outs)), outs)


def _made_for_batch(
    eqn: jex.JaxprEqn, params: Mapping[str, Any], outs: Sequence[Shape]
) -> Sequence[Place]:
    """A constant repeated for each example is per example; a numbering of the examples is not."""
    if not outs:
        return []
    (first, *others) = outs
    axes = [d for d, size in enumerate(first) if isinstance(size, Dim)]
    repeated = eqn.primitive.name == "broadcast_in_dim" or (
        eqn.primitive.name == "iota" and params["dimension"] not in axes
    )
    if others or len(axes) != 1 or not repeated:
        raise Mixes("makes values that depend on an example's position in the batch")
    return _places(axes, outs)


def _places(axes: Sequence[int | None], outs: Sequence[Shape]) -> list[Place]:
    places: list[Place] = []
    for axis, sizes in zip(axes, outs, strict=True):
        scaling = [d for d, size in enumerate(sizes) if isinstance(size, Dim)]
        if axis is None and not scaling:
            places.append(Constant())
        elif axis is not None and scaling == [axis] and isinstance(size := sizes[axis], Dim):
            places.append(PerExample(axis, size.inner))
        else:
            raise Mixes("has the batch size in more than one axis")
    return places


def _body(
    first: jex.ClosedJaxpr, second: jex.ClosedJaxpr, sizes: Sizes, inputs: Sequence[Place]
) -> Sequence[Place]:
    """The classes of a body's outputs; a refusal inside refuses the complete body."""
    a, b = first.jaxpr, second.jaxpr
    if not all(map(equal, first.consts, second.consts)):
        raise Mixes("closes over an array that depends on the size of the batch")
    classes = classify(a, b, sizes, inputs)
    outs = [classes[v] for v in a.outvars]
    for place in outs:
        if isinstance(place, Varying):
            assert place.because is not None, "a body's inputs are frozen"
            inner = place.because
            where = f" at {inner.source}" if inner.source else ""  # JAX's own equation
            raise Mixes(f"contains {inner.primitive}{where}, which {inner.reason}")
    return outs


def _structured(
    a: View, b: Any, sizes: Sizes, places: Sequence[Place], outs: Sequence[Shape]
) -> Sequence[Place]:
    """The classes of the outputs of an equation with a body; `b` has the class of `a`."""
    match a:
        case Call():
            return _body(a.body, b.body, sizes, places)
        case Scan():
            return _scan(a, b, sizes, places, outs)
        case While():
            return _while(a, b, sizes, places)
        case Cond():
            return _cond(a, b, sizes, places)
        case ShardMap():
            return _shard_map(a, b, sizes, places)


def _settle(
    body: Callable[[Sequence[Place]], Sequence[Place]], carry: Sequence[Place]
) -> tuple[Sequence[Place], Sequence[Place]]:
    """Runs a loop's body until the classes of its carry stay the same."""
    while True:
        outs = body(carry)
        new = [_join(a, b) for a, b in zip(carry, outs, strict=False)]
        if new == list(carry):
            return carry, outs
        carry = new


def _join(a: Place, b: Place) -> Place:
    if isinstance(a, PerExample) and isinstance(b, PerExample) and a != b:
        raise Mixes("carries the examples along an axis that moves")
    return b if isinstance(a, Constant) else a


def _scan(a: Scan, b: Scan, sizes, places, outs):
    consts, carries, stacks = a.parts(places)
    over_batch = a.length != b.length
    if over_batch and (carries or any(isinstance(p, PerExample) for p in consts)):
        raise Mixes("steps through the examples")
    xs = [_unstacked(p, over_batch) for p in stacks]

    def body(carry):
        return _body(a.body, b.body, sizes, [*consts, *carry, *xs])

    carry, inside = _settle(body, carries)
    if over_batch:
        return _places([0] * len(outs), outs)
    stacked = [
        PerExample(p.axis + 1, p.inner) if isinstance(p, PerExample) else p
        for p in inside[a.carries :]
    ]
    return [*carry, *stacked]


def _unstacked(place: Place, over_batch: bool) -> Place:
    if isinstance(place, PerExample):
        if place.axis == 0 and not over_batch:
            raise Mixes("steps through the examples")
        return Constant() if over_batch else PerExample(place.axis - 1, place.inner)
    return place


def _while(a: While, b: While, sizes, places):
    of_test, of_body, carries = a.parts(places)

    def body(carry):
        return _body(a.body, b.body, sizes, [*of_body, *carry])

    carry, _ = _settle(body, carries)
    _body(a.test, b.test, sizes, [*of_test, *carry])
    return carry


def _cond(a: Cond, b: Cond, sizes, places):
    branches = [
        _body(one, other, sizes, places[1:])
        for one, other in zip(a.branches, b.branches, strict=True)
    ]
    joined = branches[0]
    for branch in branches[1:]:
        joined = [_join(x, y) for x, y in zip(joined, branch, strict=True)]
    return joined


def _shard_map(a: ShardMap, b: ShardMap, sizes, places):
    """Each device runs the body on its part of the batch."""
    given = list(zip(places, a.in_specs, strict=True))
    examples = [_split_by(spec[p.axis :][:1]) for p, spec in given if isinstance(p, PerExample)]
    across = examples[0]
    if any(other != across for other in examples):
        raise Mixes("splits the examples of its inputs over different axes of the mesh")
    parts = math.prod(a.mesh[name] for name in across)
    if any(size % parts for size in sizes):
        raise Mixes("splits an example over devices")
    local = (sizes[0] // parts, sizes[1] // parts)
    if any(across & _split_by(spec) for p, spec in given if isinstance(p, Constant)):
        raise Mixes("has different parameters on the devices of different examples")
    inside = _body(a.body, b.body, local, places)
    for place, spec in zip(inside, a.out_specs, strict=True):
        if isinstance(place, PerExample) and _split_by(spec[place.axis :][:1]) != across:
            raise Mixes("joins the examples along a different mesh axis than it split them")
    return inside


def _split_by(spec: Sequence[Any]) -> set[str]:
    """The axes of the mesh that some axes of an array are split over."""
    return {name for names in spec if names for name in np.atleast_1d(names).tolist()}
