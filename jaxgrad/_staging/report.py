"""Reports what staging gains in floating point operations and bytes, and what prevents more."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from jax.extend import core as jex
from jax.extend.core import primitives

from jaxgrad._jaxpr.dataflow import between, depending, reads
from jaxgrad._jaxpr.flops import flops, nbytes, total
from jaxgrad._jaxpr.source import aval, whence
from jaxgrad._jaxpr.views import Checkpoint, bodies, view
from jaxgrad._staging import min_cut
from jaxgrad._staging.dependence import Refusal, Varying
from jaxgrad._staging.split import Split
from jaxgrad._text import work

# The fixed costs of a step and of compiling the frozen part, in operations: about 0.2 ms and 0.2 s
# at 50 GFLOP/s. Measured on two CPU cores; they matter only if there is little to gain.
_STEP = 1e7
_COMPILATION = 1e10


@dataclasses.dataclass(frozen=True)
class Crossing:
    """A value that the frozen part hands to each step.

    Attributes:
        shape: the shape for one example.
        dtype: the dtype.
        nbytes: the bytes per example.
        source: the equation that makes the value and its line, or the part of the batch.
        computed: False for a part of the batch, which needs no computation.
    """

    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    source: str
    computed: bool

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"{self.dtype}[{shape}] ({self.nbytes:,} bytes) {self.source}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What a staged loss computes once and what in every step, counted per example.

    Attributes:
        once: floating point operations that run once.
        step: operations that each step still takes, forward and backward.
        unstaged: operations that a step takes without staging.
        crossing: the values that the frozen part hands to the step.
        constants: bytes of the values computed once from parameters alone.
        batch_bytes: bytes of an example as the unstaged loss reads it.
        refusals: equations that could not be staged, with the operations that depend on them.
        random: the first random operation among frozen ones, and the operations after it.
        rows: the batch size of the prediction.
    """

    once: int
    step: int
    unstaged: int
    crossing: tuple[Crossing, ...]
    constants: int
    batch_bytes: int
    refusals: tuple[tuple[Refusal, int], ...]
    random: tuple[str, int] | None
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes to store per example."""
        return sum(c.nbytes for c in self.crossing if c.computed)

    @property
    def staged(self) -> bool:
        """Whether anything runs once per example."""
        return any(c.computed for c in self.crossing)

    @property
    def flops_per_byte(self) -> float:
        """The assumed cost of reading a byte, in operations."""
        return min_cut.FLOPS_PER_BYTE

    @property
    def speedup(self) -> float:
        """The predicted speed-up of a step."""
        return (self._before * self.rows + _STEP) / (self._after * self.rows + _STEP)

    @property
    def _before(self) -> float:
        return self.unstaged + self.flops_per_byte * self.batch_bytes

    @property
    def _after(self) -> float:
        return self.step + self.flops_per_byte * sum(c.nbytes for c in self.crossing)

    def gain(self, examples: int, epochs: float) -> float:
        """Returns the predicted speed-up of a complete training run.

        Preparation and its compilation are counted: above 1, staging pays.

        Args:
            examples: the number of examples in the dataset.
            epochs: how many times each example is used; may be a fraction.
        """
        steps = _STEP * examples / self.rows
        before = epochs * (examples * self._before + steps)
        once = examples * (self.once + self.flops_per_byte * (self.batch_bytes + self.nbytes))
        after = epochs * (examples * self._after + steps) + once + _COMPILATION
        return before / after

    def __str__(self) -> str:
        if self.staged:
            lines = [
                f"{work(self.once)} per example run once; a step takes {work(self.step)} "
                f"instead of {work(self.unstaged)} (predicted speed-up: {self.speedup:.3g})"
            ]
        else:
            lines = [f"nothing to stage: a step takes {work(self.unstaged)} per example"]
        lines += [f"  crosses: {c}" for c in self.crossing]
        if self.constants:
            lines.append(f"  constants: {self.constants:,} bytes from frozen parameters alone")
        for refusal, blocked in self.refusals:
            lines.append(f"  not staged: {refusal} ({work(blocked)} per example depend on it)")
        if self.random:
            where, blocked = self.random
            lines.append(
                f"  staged up to {where}, which is drawn anew in each step; in inference mode "
                f"{work(blocked)} more per example would run once"
            )
        return "\n".join(lines)


def report(split: Split, names: dict[jex.Var, str]) -> Report:
    """Counts what each part of a split loss computes.

    Args:
        split: the split.
        names: the names of the parts of the batch.
    """
    program, rows = split.program, split.rows
    inputs = program.jaxpr.invars
    everything = between(program.jaxpr, inputs, program.jaxpr.outvars, effects=True)
    trained = program.depending(program.trainable)
    used = {v for e in everything.eqns for v in e.invars if isinstance(v, jex.Var)}
    return Report(
        once=total(split.features().eqns) // rows,
        step=_training(split.step().eqns, trained) // rows,
        unstaged=_training(everything.eqns, trained) // rows,
        crossing=tuple(_crossing(split, v, names) for v in split.crossing),
        constants=sum(nbytes(v) for v in split.constants if v not in set(inputs)),
        batch_bytes=sum(nbytes(v) for v in program.batch if v in used) // rows,
        refusals=_blocked(split, everything.eqns, trained),
        random=_random(split, everything.eqns, trained),
        rows=rows,
    )


def _crossing(split: Split, var: jex.Var, names: dict[jex.Var, str]) -> Crossing:
    place = split.place(var)
    shape = list(aval(var).shape)
    del shape[place.axis]
    shape = [place.inner, *shape] if place.inner > 1 else shape
    maker = next((e for e in split.program.jaxpr.eqns if var in e.outvars), None)
    source = f"from {_where(maker)}" if maker else f"the batch's {names[var]}"
    size = nbytes(var) // split.rows
    return Crossing(tuple(shape), aval(var).dtype, size, source, maker is not None)


def _where(eqn: jex.JaxprEqn) -> str:
    source, scope = whence(eqn)
    return f"{eqn.primitive.name} at {source}" + (f" in {scope}" if scope else "")


def _training(eqns: Iterable[jex.JaxprEqn], trained: set[jex.Var]) -> int:
    """Operations of a step: forward, and backward through what depends on trained parameters."""
    count = 0
    for eqn in eqns:
        factors = sum(isinstance(v, jex.Var) and v in trained for v in eqn.invars)
        if eqn.primitive in (primitives.dot_general_p, primitives.conv_general_dilated_p):
            backward = factors
        elif isinstance(view(eqn), Checkpoint):
            backward = 3 * bool(factors)  # forward again, and backward at twice its cost
        else:
            backward = (2 if bodies(eqn) else 1) * bool(factors)
        count += flops(eqn) * (1 + backward)
    return count


def _blocked(
    split: Split, eqns: Iterable[jex.JaxprEqn], trained: set[jex.Var]
) -> tuple[tuple[Refusal, int], ...]:
    counts = dict.fromkeys(split.classes.refusals, 0)
    for place in map(split.classes.__getitem__, split.program.batch):
        if isinstance(place, Varying) and place.because:
            counts[place.because] = 0
    for eqn in eqns:
        places = [split.classes[v] for v in eqn.outvars]
        causes = {p.because for p in places if isinstance(p, Varying) and p.because}
        for cause in causes:
            counts[cause] += flops(eqn)
    return tuple((refusal, count // split.rows) for refusal, count in counts.items())


_RANDOM = ("random_", "threefry", "rng_")


def _random(
    split: Split, eqns: Iterable[jex.JaxprEqn], trained: set[jex.Var]
) -> tuple[str, int] | None:
    """The first draw that meets frozen values, and the operations it keeps from being staged."""
    eqns, vary = list(eqns), split.program.depending(split.program.vary)
    draws = {e for e in eqns if e.primitive.name.startswith(_RANDOM) and reads(e, vary)}
    drawn = depending(eqns, (v for e in draws for v in e.outvars))
    behind = [e for e in eqns if not drawn.isdisjoint(e.outvars) and trained.isdisjoint(e.outvars)]
    count = sum(flops(e) for e in behind if e not in draws)
    return (_where(behind[0]), count // split.rows) if behind else None
