"""What a value of a loss is in terms of the examples: of one, a sum over all, or of unknown kind.

A loss that is a mean over examples divides a sum by their number, early or late. So each place has
a unit, like a quantity in physics: a power of the number of rows, and of a count over the batch
(the tokens that are not padding). Multiplication adds units, addition needs equal ones, and the
unit of the loss tells a mean from a sum and from a weighted mean.
"""

import dataclasses
from typing import TypeAlias

from jaxgrad._staging.dependence import Refusal


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a value is divided by, as powers.

    Attributes:
        rows: of the number of rows of the batch; -1 for a mean over them.
        counts: of a count over the batch; -1 for a mean weighted by it.
    """

    rows: int = 0
    counts: int = 0

    def __mul__(self, other: "Unit") -> "Unit":
        return Unit(self.rows + other.rows, self.counts + other.counts)

    def __pow__(self, power: int) -> "Unit":
        return Unit(self.rows * power, self.counts * power)


NONE, MEAN, WEIGHTED = Unit(), Unit(rows=-1), Unit(counts=-1)


@dataclasses.dataclass(frozen=True)
class Shared:
    """The same for each batch, up to its unit: parameters, keywords, keys, literals.

    Attributes:
        zero: whether it is known to be zero or False; zero has every unit.
    """

    unit: Unit = NONE
    zero: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """Row i is computed from example i alone, or drawn for it.

    Attributes:
        axis: the axis that counts the examples.
        inner: how many consecutive entries of it belong to one example.
        zero: see `Shared`.
    """

    axis: int
    inner: int = 1
    unit: Unit = NONE
    zero: bool = False


@dataclasses.dataclass(frozen=True)
class Numbers:
    """The number of each row, as `jnp.arange(len(batch))` makes it."""

    axis: int


@dataclasses.dataclass(frozen=True)
class Indices:
    """Coordinates along the last axis, some of which are the number of the row.

    Attributes:
        axis: the axis that counts the examples.
        numbers: which coordinates are the number of the row.
    """

    axis: int
    numbers: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Sums:
    """A sum over the examples of what each gives, plus what is the same for each batch.

    Attributes:
        source: where the sum is taken.
        even: whether all its terms have the unit.
    """

    unit: Unit
    source: str
    even: bool = True


@dataclasses.dataclass(frozen=True)
class Count:
    """A function of sums that do not depend on the parameters, such as `jnp.maximum(total, 1)`."""

    unit: Unit
    source: str


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Mixes the examples, or may."""

    because: Refusal


Place: TypeAlias = Shared | Rows | Numbers | Indices | Sums | Count | Unknown
