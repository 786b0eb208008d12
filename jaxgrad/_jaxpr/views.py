"""The one place that knows the form of JAX's equations that have programs inside.

A scan, a branch, a jitted call: each is an equation whose parameters hold programs and say which
inputs go where. JAX changes the names and the layout of these parameters between releases, so
nothing else in jaxgrad reads them. `view(eqn)` returns a record in jaxgrad's own words, the same
for every release, and whatever walks programs (inlining, staging, taps, the search for a NaN)
dispatches on the record's type. To support a new form, add it to the one function here that reads
it; to support a new primitive, add a record and a row of `_READERS`.

Programs are handed out *closed*, with the arrays they close over attached; `opened` turns those
arrays into leading inputs. From jax 0.11 a program and a closed program are one class, whose
constants get lost when its inputs are replaced. Code that only ever sees closed programs or
opened ones need not know which release it runs on.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend import core as jex

from jaxgrad._jaxpr.source import whence


class ProgramError(RuntimeError):
    """The installed JAX writes an equation in a form that jaxgrad can't read.

    The message names the JAX that is installed, the equation and its source line. Whatever reads a
    function's trace may raise it: `stage`, `fit`, `audit`, `trace`, `graph`, gradients of taps,
    `find_nonfinite`, `check_grads`.
    """

    __module__ = "jaxgrad"


@dataclasses.dataclass(frozen=True)
class _OneBody:
    """What has one program inside."""

    body: jex.ClosedJaxpr

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return (self.body,)


@dataclasses.dataclass(frozen=True)
class Call(_OneBody):
    """A program that runs once, with the equation's inputs: `jax.jit` and its like."""


@dataclasses.dataclass(frozen=True)
class CustomRule(Call):
    """A call with a derivative of its own: `jax.custom_jvp`, `jax.custom_vjp`."""


@dataclasses.dataclass(frozen=True)
class Checkpoint(Call):
    """A call whose values are computed again in the backward pass: `jax.checkpoint`.

    Attributes:
        policy: which values are kept all the same, or None.
        prevent_cse: whether XLA is kept from merging both passes.
        differentiated: whether this is the second pass.
    """

    policy: Any
    prevent_cse: Any
    differentiated: bool

    def replace(
        self, eqn: jex.JaxprEqn, body: jex.Jaxpr, outvars: Sequence[jex.Var]
    ) -> jex.JaxprEqn:
        """The checkpoint of another program, which must be open: its inputs are all there is.

        Args:
            eqn: the equation that this is a view of.
            body: the program.
            outvars: what the equation's outputs are called.
        """
        params = {**eqn.params, "jaxpr": body}
        return eqn.replace(invars=list(body.invars), outvars=list(outvars), params=params)


@dataclasses.dataclass(frozen=True)
class Scan(_OneBody):
    """`jax.lax.scan`. The inputs are constants, carries and stacks, in that order.

    Attributes:
        body: from the constants, the carries and a slice of each stack to carries and slices.
        consts: how many inputs stay the same in each turn.
        carries: how many inputs, and outputs, are handed from turn to turn.
        length: how many turns.
        reverse: whether the last slices come first.
        unroll: how many turns are compiled as one.
    """

    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: Any

    @property
    def fixed(self) -> int:
        """How many inputs are not stacks."""
        return self.consts + self.carries

    def parts(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Something for each input, as what belongs to constants, carries and stacks."""
        given = list(inputs)
        return given[: self.consts], given[self.consts : self.fixed], given[self.fixed :]

    def lengthless(self, eqn: jex.JaxprEqn) -> jex.JaxprEqn:
        """The equation of this view without its length, to compare it with one of another."""
        return eqn.replace(params={**eqn.params, "length": None})

    def bind(self, eqn: jex.JaxprEqn, values: Sequence[Any], length: int) -> list[Any]:
        """Runs the scan of an equation over stacks of another length."""
        return eqn.primitive.bind(*values, **{**eqn.params, "length": length})


@dataclasses.dataclass(frozen=True)
class While:
    """`jax.lax.while_loop`. The inputs are the test's constants, the body's, and the carries.

    Attributes:
        test: from its constants and the carries to whether there is another turn.
        body: from its constants and the carries to the carries.
        test_consts: how many inputs are constants of the test.
        body_consts: how many inputs are constants of the body.
    """

    test: jex.ClosedJaxpr
    body: jex.ClosedJaxpr
    test_consts: int
    body_consts: int

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return (self.test, self.body)

    def parts(self, inputs: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Something for each input, as what belongs to the test, the body and the carries."""
        given, fixed = list(inputs), self.test_consts + self.body_consts
        return given[: self.test_consts], given[self.test_consts : fixed], given[fixed:]


@dataclasses.dataclass(frozen=True)
class Cond:
    """`jax.lax.cond` and `switch`. The first input chooses a branch, the others are its inputs."""

    branches: tuple[jex.ClosedJaxpr, ...]

    @property
    def bodies(self) -> tuple[jex.ClosedJaxpr, ...]:
        """The programs inside."""
        return self.branches


@dataclasses.dataclass(frozen=True)
class ShardMap(_OneBody):
    """`jax.shard_map`: the program runs on each device, on a part of the inputs.

    Attributes:
        body: what runs on each device.
        mesh: the sizes of the mesh's axes by name.
        in_specs: for each input, which axes of the mesh split which of its axes.
        out_specs: the same for each output.
        over: the axes of the mesh that the program runs over.
    """

    mesh: Mapping[str, int]
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    over: frozenset[str]


View: TypeAlias = Call | CustomRule | Checkpoint | Scan | While | Cond | ShardMap


def view(eqn: jex.JaxprEqn) -> View | None:
    """The equation in jaxgrad's words, or None where it is no kind that has a program inside.

    Raises:
        ProgramError: the installed JAX lays the equation out in a way that is not known here.
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
    """The programs inside of an equation, also of one that has no view."""
    known = view(eqn)
    return known.bodies if known else tuple(map(closed, jex.jaxprs_in_params(eqn.params)))


def inner_consts(jaxpr: jex.Jaxpr) -> Iterator[Any]:
    """The arrays that the programs inside of a program close over, however deep."""
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            yield from body.consts
            yield from inner_consts(body.jaxpr)


def closed(program: Any) -> jex.ClosedJaxpr:
    """A program with the arrays that it closes over attached, of which there may be none.

    Raises:
        TypeError: this is no program.
    """
    if isinstance(program, jex.ClosedJaxpr):
        return program
    if not isinstance(program, jex.Jaxpr):
        raise TypeError(f"{type(program).__name__} is no program")
    return jex.ClosedJaxpr(program, [])


def opened(program: jex.ClosedJaxpr) -> tuple[jex.Jaxpr, list[Any]]:
    """A program whose first inputs are the arrays that it closes over, and these arrays."""
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
