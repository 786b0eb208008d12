"""Splits a traced loss in three: run once, once per example, and in every step."""

import dataclasses
from collections.abc import Sequence

from jax.extend import core as jex

from jaxgrad._jaxpr.dataflow import between, taken
from jaxgrad._jaxpr.source import whence
from jaxgrad._staging.dependence import Classes, Constant, PerExample, Refusal, Varying, classify
from jaxgrad._staging.min_cut import minimum_cut
from jaxgrad._staging.traced_loss import Program, TracedLoss, check_closed_over, pair
from jaxgrad._staging.two_traces import Misaligned


@dataclasses.dataclass(frozen=True)
class Split:
    """Where a loss is cut, in terms of one trace of it.

    Attributes:
        program: the trace.
        rows: the batch size of the trace.
        classes: the class of each value.
        crossing: the per-example values that the frozen part hands to the step.
        constants: the values that the step needs and that depend on frozen parameters alone.
    """

    program: Program
    rows: int
    classes: Classes
    crossing: Sequence[jex.Var]
    constants: Sequence[jex.Var]

    @property
    def computed(self) -> list[jex.Var]:
        """The crossing values that are not a part of the batch."""
        return [v for v in self.crossing if v not in set(self.program.batch)]

    def place(self, var: jex.Var) -> PerExample:
        """The axis that counts the examples in a crossing value."""
        if var in self.program.batch:
            return PerExample(0)
        place = self.classes[var]
        assert isinstance(place, PerExample)
        return place

    def fold(self) -> jex.Jaxpr:
        """From the frozen inputs to the constants."""
        return between(self.program.jaxpr, self.program.frozen, self.constants)

    def features(self) -> jex.Jaxpr:
        """From the frozen inputs and a batch to the computed features."""
        inputs = [*self.program.frozen, *self.program.batch]
        return between(self.program.jaxpr, inputs, self.computed)

    def step(self) -> jex.Jaxpr:
        """From trainable parameters, constants, features and varying inputs to the loss."""
        program = self.program
        inputs = [*program.trainable, *self.constants, *self.crossing, *program.vary]
        return between(program.jaxpr, inputs, program.jaxpr.outvars, effects=True)

    def at(self, program: Program, rows: int) -> "Split":
        """The same split of a trace at another batch size.

        Raises:
            Misaligned: the loss computes something else at this size.
        """
        if rows == 1:
            return self._of_one_row(program)
        pairs = pair(self.program, program)
        again = _classify(self.program, program, (self.rows, rows))
        if any(again[v] != self.classes[v] for v in (*self.crossing, *self.constants)):
            raise Misaligned("its frozen part depends on the size of the batch")
        places = {pairs[v]: place for v, place in self.classes.places.items() if v in pairs}
        return Split(
            program,
            rows,
            Classes(places, self.classes.refusals),
            [pairs[v] for v in self.crossing],
            [pairs[v] for v in self.constants],
        )

    def _of_one_row(self, program: Program) -> "Split":
        """The same split for one row, whose trace has no equations that repeat a value per row.

        So the frozen parts differ in their equations, and may: only the steps are compared,
        backwards from the outputs to the crossing.
        """
        check_closed_over(self.program, program)
        ours, theirs = (
            {v: (e, i) for e in p.jaxpr.eqns for i, v in enumerate(e.outvars)}
            for p in (self.program, program)
        )
        pairs = dict(zip(self.program.jaxpr.invars, program.jaxpr.invars, strict=True))
        given = {*self.program.jaxpr.invars, *self.constants, *self.crossing}
        todo = list(zip(self.program.jaxpr.outvars, program.jaxpr.outvars, strict=True))
        while todo:
            a, b = todo.pop()
            if isinstance(a, jex.Literal) and isinstance(b, jex.Literal):
                continue
            if isinstance(a, jex.Literal) or isinstance(b, jex.Literal):
                raise Misaligned("it computes something else")
            if pairs.setdefault(a, b) is not b:
                raise Misaligned("it uses other values")
            if a in given:
                continue
            (eqn, i), (other, j) = ours[a], theirs.get(b, (None, 0))
            if other is None or (eqn.primitive, i) != (other.primitive, j):
                raise Misaligned(f"it computes something else at {whence(eqn)[0]}")
            todo += zip(eqn.invars, other.invars, strict=True)
        places = {pairs[v]: place for v, place in self.classes.places.items() if v in pairs}
        return Split(
            program,
            1,
            Classes(places, self.classes.refusals),
            [pairs[v] for v in self.crossing],
            [pairs[v] for v in self.constants],
        )


def split(loss: TracedLoss, rows: int) -> Split:
    """Finds the frozen part of a loss and cuts it off at the cheapest place.

    Args:
        loss: the loss with the shapes of its arguments.
        rows: the batch size to trace it with.
    """
    program = loss.trace(rows)
    classes = _classes(loss, program, rows)
    frozen = program.depending(program.frozen)
    folded = [v for v in _values(program.jaxpr) if isinstance(classes[v], Constant) and v in frozen]
    crossing = minimum_cut(
        [e for e in program.jaxpr.eqns if not _constant(e, classes)],
        [v for v in program.batch if isinstance(classes[v], PerExample)],
        forced=lambda e: bool(e.effects) or any(isinstance(classes[v], Varying) for v in e.outvars),
        outputs=[v for v in program.jaxpr.outvars if isinstance(v, jex.Var)],
    )
    # If nothing is known about a part of the batch, the step takes it unchanged.
    unknown = [v for v in program.batch if isinstance(classes[v], Varying)]
    whole = Split(program, rows, classes, [*crossing, *unknown], folded)
    used = taken(whole.step())
    return dataclasses.replace(
        whole,
        crossing=[*crossing, *(v for v in unknown if v in used)],
        constants=[v for v in folded if v in used],
    )


def _classes(loss: TracedLoss, program: Program, rows: int) -> Classes:
    try:
        other = loss.trace(2 * rows)
        pair(program, other)
    except Exception as error:  # whatever the user's function raises
        # Without a second trace nothing is known about the batch axis.
        why = f"can't be compared with a trace at {2 * rows} rows: {_first_line(error)}"
        return _classify(program, program, (rows, rows), Refusal(why, "the batch", "", ""))
    return _classify(program, other, (rows, 2 * rows))


def _classify(
    program: Program, other: Program, sizes: tuple[int, int], refused: Refusal | None = None
) -> Classes:
    places = {
        **dict.fromkeys(program.frozen, Constant()),
        **dict.fromkeys([*program.trainable, *program.vary], Varying()),
        **dict.fromkeys(program.batch, Varying(refused) if refused else PerExample(0)),
    }
    inputs = [places[v] for v in program.jaxpr.invars]
    return classify(program.jaxpr, other.jaxpr, sizes, inputs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _values(jaxpr: jex.Jaxpr) -> list[jex.Var]:
    return [*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)]


def _constant(eqn: jex.JaxprEqn, classes: Classes) -> bool:
    return bool(eqn.outvars) and all(isinstance(classes[v], Constant) for v in eqn.outvars)
