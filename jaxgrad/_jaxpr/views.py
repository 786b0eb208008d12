"""The only module that reads the parameters of JAX's equations with programs inside.

A scan, a branch, a jitted call: each is an equation whose parameters hold programs and assign the
inputs to them. JAX changes the names and the layout of these parameters between releases, so
nothing else in jaxgrad reads them. `view(eqn)` returns a record in jaxgrad's own words, the same
for every release, and all code that walks programs (inlining, staging, taps, the search for a NaN)
dispatches on the record's type. To support a new form, add it to the function here that reads
it; to support a new primitive, add a record and a row of `_READERS`.

Views hold *closed* programs, with the arrays that they close over attached; `opened` turns those
arrays into leading inputs. From jax 0.11 a program and a closed program are one class, which loses
its constants when its inputs are replaced. Code that only sees closed or opened programs does not
depend on the release.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
from jax.extend import core as jex
from jax.typing import ArrayLike

from jaxgrad._jaxpr.source import whence

T = TypeVar("T")


class ProgramError(RuntimeError):
    """The installed JAX writes an equation in a form that jaxgrad can't read.

    The message names the installed JAX, the equation and its source line. Everything that reads a
    function's trace can raise it: `stage`, `fit`, `audit`, `trace`, `graph`, gradients of taps,
    `find_nonfinite`, `check_grads`.
    """

    __module__ = "jaxgrad"


@dataclasses.dataclass(frozen=True)
class _OneBody:
    """An equation with one program inside."""

    body: jex.ClosedJaxpr

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return (self.body,)


@dataclasses.dataclass(frozen=True)
class Call(_OneBody):
    """A program that runs once, on the equation's inputs: `jax.jit` and similar calls."""


@dataclasses.dataclass(frozen=True)
class CustomRule(Call):
    """A call with a derivative of its own: `jax.custom_jvp`, `jax.custom_vjp`."""


@dataclasses.dataclass(frozen=True)
class Checkpoint(Call):
    """A call whose values are recomputed in the backward pass: `jax.checkpoint`.

    Attributes:
        policy: which values are kept nevertheless, or None.
        prevent_cse: whether XLA must not merge the two passes.
        differentiated: whether this is the second pass.
    """

    policy: Any
    prevent_cse: Any
    differentiated: bool

    def replace(
        self, eqn: jex.JaxprEqn, body: jex.Jaxpr, outvars: Sequence[jex.Var]
    ) -> jex.JaxprEqn:
        """The checkpoint of another program, which must be open: all that it reads are inputs.

        Args:
            eqn: the equation of this view.
            body: the program.
            outvars: the outputs of the new equation.
        """
        params = {**eqn.params, "jaxpr": body}
        return eqn.replace(invars=list(body.invars), outvars=list(outvars), params=params)


@dataclasses.dataclass(frozen=True)
class Scan(_OneBody):
    """`jax.lax.scan`. The inputs are constants, carries and stacks, in that order.

    Attributes:
        body: from the constants, the carries and a slice of each stack to carries and slices.
        consts: the number of inputs that are the same in each iteration.
        carries: the number of inputs, and of outputs, that one iteration hands to the next.
        length: the number of iterations.
        reverse: whether the last slices come first.
        unroll: the number of iterations that are compiled as one.
    """

    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: Any

    @property
    def fixed(self) -> int:
        """The number of inputs that are not stacks."""
        return self.consts + self.carries

    def parts(self, inputs: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Splits a sequence with an item per input into those of constants, carries and stacks."""
        given = list(inputs)
        return given[: self.consts], given[self.consts : self.fixed], given[self.fixed :]

    def lengthless(self, eqn: jex.JaxprEqn) -> jex.JaxprEqn:
        """The equation of this view without its length, to compare scans of different lengths."""
        return eqn.replace(params={**eqn.params, "length": None})

    def bind(self, eqn: jex.JaxprEqn, values: Sequence[Any], length: int) -> list[Any]:
        """Runs the scan of an equation over stacks of another length."""
        return eqn.primitive.bind(*values, **{**eqn.params, "length": length})


@dataclasses.dataclass(frozen=True)
class While:
    """`jax.lax.while_loop`. The inputs are the test's constants, the body's, and the carries.

    Attributes:
        test: from its constants and the carries to whether there is another iteration.
        body: from its constants and the carries to the carries.
        test_consts: the number of inputs that are constants of the test.
        body_consts: the number of inputs that are constants of the body.
    """

    test: jex.ClosedJaxpr
    body: jex.ClosedJaxpr
    test_consts: int
    body_consts: int

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return (self.test, self.body)

    def parts(self, inputs: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Splits a sequence with an item per input into those of test, body and carries."""
        given, fixed = list(inputs), self.test_consts + self.body_consts
        return given[: self.test_consts], given[self.test_consts : fixed], given[fixed:]


@dataclasses.dataclass(frozen=True)
class Cond:
    """`jax.lax.cond` and `switch`. The first input chooses a branch, which reads the others."""

    branches: tuple[jex.ClosedJaxpr, ...]

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return self.branches


@dataclasses.dataclass(frozen=True)
class ShardMap(_OneBody):
    """`jax.shard_map`: the program runs on each device, on its part of the inputs.

    Attributes:
        body: the program that runs on each device.
        mesh: the sizes of the mesh axes by name.
        in_specs: for each input, the mesh axes that split each of its axes.
        out_specs: the same for each output.
        over: the mesh axes that the program runs over.
    """

    mesh: Mapping[str, int]
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    over: frozenset[str]


View: TypeAlias = Call | CustomRule | Checkpoint | Scan | While | Cond | ShardMap


def view(eqn: jex.JaxprEqn) -> View | None:
    """The equation in jaxgrad's words, or None if its primitive has no program inside.

    Raises:
        ProgramError: the installed JAX writes the equation in an unknown form.
    """
    read = _READERS.get(eqn.primitive.name)
    if read is None:
        return None
    try:
        return read(eqn.params)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProgramError(
            f"jax {jax.__version__} writes the {eqn.primitive.name} at {whence(eqn)[0]} in a form "
            f"that this jaxgrad can't read (its parameters are {', '.join(sorted(eqn.params))}). "
            "jaxgrad reads the programs of jax 0.10.2 to 0.12: install one of these, or a newer "
            "jaxgrad."
        ) from error


def bodies(eqn: jex.JaxprEqn) -> tuple[jex.ClosedJaxpr, ...]:
    """The programs inside an equation, even if it has no view."""
    known = view(eqn)
    return known.bodies if known else tuple(map(closed, jex.jaxprs_in_params(eqn.params)))


def inner_consts(jaxpr: jex.Jaxpr) -> Iterator[ArrayLike]:
    """The arrays that the programs inside a program close over, at any depth."""
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            yield from body.consts
            yield from inner_consts(body.jaxpr)


def closed(program: object) -> jex.ClosedJaxpr:
    """A closed program: an open one gets an empty list of constants.

    Raises:
        TypeError: this is not a program.
    """
    if isinstance(program, jex.ClosedJaxpr):
        return program
    if not isinstance(program, jex.Jaxpr):
        raise TypeError(f"{type(program).__name__} is not a program")
    return jex.ClosedJaxpr(program, [])


def opened(program: jex.ClosedJaxpr) -> tuple[jex.Jaxpr, list[ArrayLike]]:
    """A program that takes the arrays that it closes over as its first inputs, and these arrays."""
    jaxpr, consts = program.jaxpr, list(program.consts)
    return jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars]), consts


def _call(name: str, params: Mapping[str, Any]) -> Call:
    return Call(closed(params[name]))


def _custom_rule(params: Mapping[str, Any]) -> CustomRule:
    return CustomRule(closed(params["call_jaxpr"]))


def _checkpoint(params: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        closed(params["jaxpr"]), params["policy"], params["prevent_cse"], params["differentiated"]
    )


def _scan(params: Mapping[str, Any]) -> Scan:
    if "ft_in" in params:
        consts, carries, _ = map(len, params["ft_in"].unpack())
    else:  # jax 0.10, the last for Python 3.11
        consts, carries = params["num_consts"], params["num_carry"]
    return Scan(
        closed(params["jaxpr"]),
        consts,
        carries,
        params["length"],
        params["reverse"],
        params["unroll"],
    )


def _while(params: Mapping[str, Any]) -> While:
    return While(
        closed(params["cond_jaxpr"]),
        closed(params["body_jaxpr"]),
        params["cond_nconsts"],
        params["body_nconsts"],
    )


def _cond(params: Mapping[str, Any]) -> Cond:
    return Cond(tuple(map(closed, params["branches"])))


def _shard_map(params: Mapping[str, Any]) -> ShardMap:
    return ShardMap(
        closed(params["jaxpr"]),
        dict(params["mesh"].shape),
        tuple(params["in_specs"]),
        tuple(params["out_specs"]),
        frozenset(params["newly_manual_axes"]),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], View]] = {
    "call": functools.partial(_call, "call_jaxpr"),
    "closed_call": functools.partial(_call, "call_jaxpr"),
    "cond": _cond,
    "custom_jvp_call": _custom_rule,
    "custom_vjp_call": _custom_rule,
    "eval_jaxpr": functools.partial(_call, "call_jaxpr"),  # from jax 0.11 on, for the three calls
    "jit": functools.partial(_call, "jaxpr"),
    "remat2": _checkpoint,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
