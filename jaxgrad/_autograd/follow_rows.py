"""Follows the examples of a batch through a loss to its value.

The equations that keep the examples apart are followed by the rules of staging
(`_staging/batch_axis.py`), on traces at two batch sizes. Here are the ones that staging has no use
for: sums over the examples and what is linear in them, random draws, the numbers of the rows. An
equation without a rule makes its outputs `Unknown`, which refuses the loss only if its value
depends on them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from jaxgrad._autograd import linear
from jaxgrad._autograd.places import (
    NONE,
    Count,
    Indices,
    Numbers,
    Place,
    Rows,
    Shared,
    Sums,
    Unit,
    Unknown,
)
from jaxgrad._jaxpr.dataflow import depending, reads
from jaxgrad._jaxpr.source import Atom, called_at, shape, whence
from jaxgrad._jaxpr.views import Call, Cond, Scan, View, While, opened, view
from jaxgrad._staging import batch_axis
from jaxgrad._staging.batch_axis import LEFT_OUT, NEVER_CONSTANT, RULES, Dim, Mixes, Shape, Step
from jaxgrad._staging.dependence import Refusal
from jaxgrad._staging.two_traces import (
    SIZES,
    Misaligned,
    Sizes,
    align,
    equal,
    parameters_differ,
    unify,
)
from jaxgrad._tree.flat import is_key

# Each row has a draw of its own, whichever number it has in the batch.
_DRAWS = {
    "random_bits",
    "random_fold_in",
    "random_gamma",
    "random_seed",
    "random_split",
    "random_unwrap",
    "random_wrap",
    "rng_bit_generator",
    "threefry2x32",
}
# Over the axis of a mesh, by a loss that runs on each device.
_ACROSS = {"psum", "psum_invariant", "pvary", "axis_index"}

_NUMBERS_STAY = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "reshape",
    "squeeze",
    "stop_gradient",
    "transpose",
}

_POSITION = "uses an example's position in the batch"


def follow(
    first: jex.Jaxpr,
    second: jex.Jaxpr,
    sizes: Sizes,
    inputs: Sequence[Place],
    trained: set[jex.Var],
) -> list[Place]:
    """The places of the outputs of a function.

    Args:
        first: the function, traced at the first batch size; it has no constants.
        second: the same equations, at the second.
        sizes: the two batch sizes.
        inputs: the places of the inputs.
        trained: the inputs of `first` that are differentiated.
    """
    places = dict(zip(first.invars, inputs, strict=True))
    walk = _Equations(sizes, depending(first.eqns, trained))

    def place(x: Atom, y: Atom) -> Place:
        if isinstance(x, jex.Literal) and isinstance(y, jex.Literal):
            return constant(x.val, y.val, sizes)
        return places[x] if isinstance(x, jex.Var) else _uses_the_size()

    for a, b in zip(first.eqns, second.eqns, strict=True):
        given = [place(x, y) for x, y in zip(a.invars, b.invars, strict=True)]
        places.update(zip(a.outvars, walk(a, b, given), strict=True))
    return [place(x, y) for x, y in zip(first.outvars, second.outvars, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Equations:
    """The places of the outputs of an equation.

    Attributes:
        sizes: the two batch sizes.
        trained: the values that depend on what is differentiated.
    """

    sizes: Sizes
    trained: set[jex.Var]

    def __call__(self, a: jex.JaxprEqn, b: jex.JaxprEqn, places: list[Place]) -> Sequence[Place]:
        if a.primitive.name == "select_n" and getattr(places[0], "zero", False):
            return [places[1]]  # where(number < 0, number + len(x), number), as indexing writes it
        for p in places:
            if isinstance(p, Unknown):
                return [p if p.because.source else _refused(a, p.because.reason)] * len(a.outvars)
        try:
            outs = self.outputs(a, b, places)
            self.check_parameters(a, b)
            return outs
        except (Mixes, Misaligned) as error:
            return [_refused(a, str(error))] * len(a.outvars)

    def outputs(self, a: jex.JaxprEqn, b: jex.JaxprEqn, places: list[Place]) -> Sequence[Place]:
        name, ours, theirs = a.primitive.name, view(a), view(b)
        kinds = {type(p) for p in places}
        if ours is not None:
            return self.structured(a, ours, theirs, places)
        step, source = self.step(a, b, places), f"{name} at {whence(a)[0]}"
        if name in _ACROSS and kinds <= {Shared, Sums}:
            return places or [Shared()]
        if name in NEVER_CONSTANT or (a.effects and a.outvars):
            raise Mixes(LEFT_OUT.get(name, "has a side effect"))
        if kinds & {Sums, Count}:
            free = [isinstance(v, jex.Literal) or v not in self.trained for v in a.invars]
            return [linear.of_sums(name, step, places, free, source)] * len(a.outvars)
        if kinds & {Numbers, Indices}:
            return _of_numbers(name, step, places)
        if kinds <= {Shared}:
            return _of_shared(name, step, places)
        return _of_rows(name, step, places, source)

    def check_parameters(self, a: jex.JaxprEqn, b: jex.JaxprEqn) -> None:
        one, other = (v.lengthless(e) if isinstance(v := view(e), Scan) else e for e in (a, b))
        if parameters_differ(one, other, self.sizes):
            raise Mixes("depends on the size of the batch")

    def step(self, a: jex.JaxprEqn, b: jex.JaxprEqn, places: Sequence[Place]) -> Step:
        ins, outs = (
            [unify(shape(x), shape(y), self.sizes) for x, y in zip(xs, ys, strict=True)]
            for xs, ys in ((a.invars, b.invars), (a.outvars, b.outvars))
        )
        params = dict(a.params)
        for size in SIZES.get(a.primitive.name, ()):
            params[size] = unify(a.params[size], b.params[size], self.sizes)
        axes = [getattr(p, "axis", None) for p in places]
        return Step(params, axes, ins, outs)

    def structured(
        self, eqn: jex.JaxprEqn, a: View, b: View | None, places: list[Place]
    ) -> Sequence[Place]:
        moved = reads(eqn, self.trained)
        match a, b:
            case Call(), Call():
                return self.body(a.body, b.body, places, moved)
            case Scan(), Scan():
                return self.scan(a, b, places, moved)
            case While(), While():
                of_test, of_body, carries = a.parts(places)
                carries, _ = _settled(
                    lambda carry: self.body(a.body, b.body, [*of_body, *carry], moved), carries
                )
                (test,) = self.body(a.test, b.test, [*of_test, *carries], moved)
                if not isinstance(test, Shared):
                    raise Mixes("loops until all examples are done")
                return carries
            case Cond(), Cond():
                if not isinstance(places[0], Shared):
                    raise Mixes("branches on a value of the complete batch")
                branches = [
                    self.body(one, other, places[1:], moved)
                    for one, other in zip(a.branches, b.branches, strict=True)
                ]
                return [_joined(*outs) for outs in zip(*branches, strict=True)]
        raise Mixes("has a program inside that is not followed")

    def body(
        self, a: jex.ClosedJaxpr, b: jex.ClosedJaxpr, places: Sequence[Place], moved: bool
    ) -> list[Place]:
        (ours, consts), (theirs, others) = opened(a), opened(b)
        align(ours, theirs)
        closed_over = [constant(x, y, self.sizes) for x, y in zip(consts, others, strict=True)]
        trained = set(ours.invars) if moved else set()
        return follow(ours, theirs, self.sizes, [*closed_over, *places], trained)

    def scan(self, a: Scan, b: Scan, places: list[Place], moved: bool) -> Sequence[Place]:
        consts, carries, stacks = a.parts(places)
        over_rows = a.length != b.length
        if over_rows and (carries or not all(isinstance(p, Shared) for p in consts)):
            raise Mixes("steps through the examples")
        xs = [_of_iteration(p, over_rows) for p in stacks]
        carries, outs = _settled(
            lambda carry: self.body(a.body, b.body, [*consts, *carry, *xs], moved), carries
        )
        return [*carries, *(_stacked(p, over_rows) for p in outs[a.carries :])]


def _refused(eqn: jex.JaxprEqn, reason: str) -> Unknown:
    line, scope = whence(eqn)
    return Unknown(Refusal(reason, eqn.primitive.name, line + called_at(eqn), scope))


def _settled(
    body: Callable[[Sequence[Place]], Sequence[Place]], carry: Sequence[Place]
) -> tuple[Sequence[Place], Sequence[Place]]:
    """Runs a loop's body until the places of its carry stay the same."""
    while True:
        outs = body(carry)
        new = [_joined(a, b) for a, b in zip(carry, outs, strict=False)]
        if new == list(carry):
            return carry, outs
        carry = new


def _joined(*places: Place) -> Place:
    """What a value is that may be any of these.

    Raises:
        Mixes: they have nothing in common.
    """
    first, *others = places
    for other in others:
        match first, other:
            case (Unknown(), _) | (_, Shared(zero=True)):
                pass
            case (_, Unknown()) | (Shared(zero=True), _):
                first = other
            case (Shared(), Shared()) if first.unit == other.unit:
                first = Shared(first.unit)
            case (Rows(), Rows()) if first.zero or first == dataclasses.replace(
                other, zero=first.zero
            ):
                first = dataclasses.replace(other, zero=first.zero and other.zero)
            case (Rows(), Rows()) if other.zero and first.axis == other.axis:
                pass
            case (Sums(), Sums()) if first.unit == other.unit:
                first = dataclasses.replace(first, even=first.even and other.even)
            case (Sums(), Shared()) if linear.compatible(other, first.unit):
                pass
            case (Shared(), Sums()) if linear.compatible(first, other.unit):
                first = other
            case _ if first != other:
                raise Mixes("carries values of the examples that change their place")
    return first


def _of_iteration(place: Place, over_rows: bool) -> Place:
    """What one iteration of a scan reads of a stack."""
    if not isinstance(place, Rows):
        if isinstance(place, Numbers | Indices):
            raise Mixes(_POSITION)
        return place
    if over_rows:
        return Shared(place.unit, place.zero)
    if place.axis == 0:
        raise Mixes("steps through the examples")
    return dataclasses.replace(place, axis=place.axis - 1)


def _stacked(place: Place, over_rows: bool) -> Place:
    if over_rows:
        assert isinstance(place, Shared | Unknown)
        return Rows(0, 1, place.unit, place.zero) if isinstance(place, Shared) else place
    return dataclasses.replace(place, axis=place.axis + 1) if isinstance(place, Rows) else place


def _of_shared(name: str, step: Step, places: Sequence[Place]) -> list[Place]:
    """Outputs of what all examples share: shared, or made for each row."""
    unit, zero = linear.unit(name, step, places), linear.zero(name, places)
    return [_made(name, step, sizes, unit, zero) for sizes in step.outs]


def _made(name: str, step: Step, sizes: Shape, unit: Unit, zero: bool) -> Place:
    axes = [d for d, size in enumerate(sizes) if isinstance(size, Dim)]
    if not axes:
        return Shared(unit, zero)
    axis, *more = axes
    size = sizes[axis]
    inner = size.inner if isinstance(size, Dim) else 1
    if more:
        raise Mixes("has the batch size in more than one axis")
    if name == "broadcast_in_dim" or name in _DRAWS:
        return Rows(axis, inner, unit, zero)
    if name == "iota" and step.params["dimension"] != axis:
        return Rows(axis, inner)
    if name == "iota" and inner == 1:
        return Numbers(axis)
    raise Mixes(_POSITION)


def _of_rows(name: str, step: Step, places: Sequence[Place], source: str) -> list[Place]:
    """Outputs of values with a row for each example, and of what all examples share."""
    unit, zero = linear.unit(name, step, places), linear.zero(name, places)
    if _sums_over_examples(name, step):
        return [Sums(unit, source)]
    if name in _DRAWS:
        axes: list[int | None] = [step.axis] * len(step.outs)
    elif name in RULES:
        axes = batch_axis.follow(name, step)
    else:
        raise Mixes(LEFT_OUT.get(name, "has no rule for the rows of a batch"))
    made: list[Place] = []
    for axis, sizes in zip(axes, step.outs, strict=True):
        scaling = [d for d, size in enumerate(sizes) if isinstance(size, Dim)]
        size = sizes[axis] if axis is not None else None
        if axis is None and not scaling:
            made.append(Shared(unit))
        elif axis is not None and scaling == [axis] and isinstance(size, Dim):
            made.append(Rows(axis, size.inner, unit, zero))
        else:
            raise Mixes("has the batch size in more than one axis")
    return made


def _sums_over_examples(name: str, step: Step) -> bool:
    if name == "reduce_sum":
        return step.axis in step.params["axes"]
    if name != "dot_general" or any(axis is None for axis in step.axes):
        return False
    (left, right), _ = step.params["dimension_numbers"]
    one, other = step.axes
    return one in left and other in right and left.index(one) == right.index(other)


def _of_numbers(name: str, step: Step, places: Sequence[Place]) -> list[Place]:
    """Outputs of the numbers of the rows: they choose in each row its own part, or draw for it."""
    if name in _DRAWS:
        return [_made(name, step, sizes, NONE, False) for sizes in step.outs]
    first = places[0]
    if name in _NUMBERS_STAY and isinstance(first, Numbers):
        (axis,) = batch_axis.follow(name, step)
        scaling = [d for d, size in enumerate(step.outs[0]) if isinstance(size, Dim)]
        if axis is not None and scaling == [axis] and step.outs[0][axis] == Dim(1):
            return [Numbers(axis)]
    if name == "lt" and isinstance(first, Numbers) and places[1] == Shared(zero=True):
        return [Rows(first.axis, zero=True)]  # False for each row
    last = len(step.outs[0]) - 1
    if name == "concatenate" and step.params["dimension"] == last != step.axis:
        return [_coordinates(step, places)]
    if name == "gather" and isinstance(first, Rows) and isinstance(places[1], Numbers | Indices):
        return [_own_part(step, first, places[1])]
    raise Mixes(_POSITION)


def _coordinates(step: Step, places: Sequence[Place]) -> Indices:
    numbers, column = set(), 0
    if not all(isinstance(p, Numbers | Rows) for p in places):
        raise Mixes(_POSITION)
    for place, sizes in zip(places, step.ins, strict=True):
        if isinstance(place, Numbers):
            numbers.add(column)
        column += sizes[-1] if isinstance(sizes[-1], int) else 0
    return Indices(step.axis, frozenset(numbers))


def _own_part(step: Step, operand: Rows, indices: Numbers | Indices) -> Rows:
    """`x[jnp.arange(len(x)), labels]`: in each row something of the row itself."""
    numbers = step.params["dimension_numbers"]
    own = [0] if isinstance(indices, Numbers) else indices.numbers
    named = {numbers.start_index_map[column] for column in own}
    taken = operand.axis in numbers.collapsed_slice_dims and operand.inner == 1
    if isinstance(indices, Numbers) and step.ins[1][-1] != 1:
        raise Mixes(_POSITION)
    if named != {operand.axis} or not taken:
        raise Mixes("indexes into other examples")
    batch_out = [d for d in range(len(step.outs[0])) if d not in numbers.offset_dims]
    return Rows(batch_out[indices.axis], 1, operand.unit)


def constant(a: Any, b: Any, sizes: Sizes) -> Place:
    """The place of a constant that two traces have, at two batch sizes."""
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return Shared() if a is b else _uses_the_size()
    if equal(a, b):
        return Shared(zero=not is_key(a) and np.size(a) == 1 and not np.any(a))
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return _made_for_batch(a, b, sizes)
    for power in (1, -1):
        scaled = a.astype("float64") * (sizes[1] / sizes[0]) ** power
        if np.allclose(scaled, b.astype("float64"), rtol=1e-6, atol=0):
            return Shared(Unit(rows=power))
    return _uses_the_size()


def _made_for_batch(a: np.ndarray, b: np.ndarray, sizes: Sizes) -> Place:
    """The place of an array that NumPy made: the same for each row, or their numbers."""
    try:
        axes = [d for d, size in enumerate(unify(a.shape, b.shape, sizes)) if isinstance(size, Dim)]
    except Mixes:
        return _uses_the_size()
    if len(axes) == 1:
        (axis,) = axes
        row = np.take(a, [0], axis)
        if np.array_equal(a, np.broadcast_to(row, a.shape)) and np.array_equal(
            b, np.broadcast_to(row, b.shape)
        ):
            return Rows(axis, a.shape[axis] // sizes[0], zero=not np.any(a))
        if all(np.array_equal(x, np.arange(n)) for x, n in zip((a, b), sizes, strict=True)):
            return Numbers(axis)
    return _uses_the_size()


def _uses_the_size() -> Unknown:
    return Unknown(Refusal("depends on the size of the batch", "a number in the loss", "", ""))
