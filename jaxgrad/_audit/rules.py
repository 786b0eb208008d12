"""What is wrong with a way to train: one rule per kind of leak, each with its reason and cure."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jaxgrad._audit.cost import Cost
from jaxgrad._audit.liveness import Liveness
from jaxgrad._text import listed, size
from jaxgrad._tree.bitwise import Change


@dataclasses.dataclass(frozen=True)
class Row:
    """What an audit found out about one parameter.

    Attributes:
        path: its path.
        spec: dtype and shape, `float32[3,2]`.
        trained: whether it is meant to be trained.
        used: whether the loss depends on its value.
        gradient: "computed"; "dropped", where there is one that nothing reads, so that XLA leaves
            it out; "zero", where it is a constant zero; "none", where there is no gradient;
            "unknown", within a step of one's own.
        share: its share in the squared global norm of the gradients, 0 to 1.
        state: bytes that the optimizer holds for it.
        change: how it differs after some steps, None if it is bit-identical.
        why: what moves it, some of "gradient", "raw gradient", "decay", "momentum", "noise"
            (found by experiment, so also where the value is yet unchanged); "statistics", where
            the step itself writes it; "rounding", where adding a zero has changed a bit.
    """

    path: str
    spec: str
    trained: bool
    used: bool
    gradient: Liveness
    share: float
    state: int
    change: Change | None
    why: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Leak:
    """Something that is frozen and should cost or move nothing, or is trained and can't be.

    Attributes:
        kind: "moves", "ascends", "norm", "gradient", "state", "unused", "stopped", "stuck",
            "tied", "statistics", "lost", "forgotten", "unsaved" or "cost".
        paths: the parameters at fault; none if it is the complete step.
        what: what is wrong.
        why: how it comes about.
        fix: what to do.
    """

    kind: str
    paths: tuple[str, ...]
    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        who = f"{listed([repr(p) for p in self.paths])}: " if self.paths else ""
        return f"{who}{self.what}. Why: {self.why}. Fix: {self.fix}."


_DEAR = 1.2  # how many times the operations that it needs a step may take

SPLIT = (
    "differentiate the trained half alone, `jaxgrad.value_and_grad(loss, wrt)`, and initialise the "
    "optimizer on it: `tx.init(jaxgrad.partition(params, wrt)[0])`"
)

_MOVES = {
    "decay": (
        "weight decay: with no gradient its update still follows its value",
        "let only what is trained reach the decay: jaxgrad.param_groups({wrt: tx}), or the decay's "
        "own mask=",
    ),
    "raw gradient": (
        "its raw gradient is passed through: where its mask is False, optax.masked returns what "
        "it is given, so that the parameter moves up the loss",
        "give the others zero updates: jaxgrad.param_groups({wrt: tx}), or optax.partition with "
        "optax.set_to_zero",
    ),
    "gradient": (
        "it has a gradient, and the optimizer takes a step by it",
        "jaxgrad.param_groups({wrt: tx}); or give tx the trained half only",
    ),
    "momentum": (
        "momentum: the state of the optimizer moves it on when its gradient is zero",
        "hold no state for it: initialise on `jaxgrad.partition(params, wrt)[0]`",
    ),
    "noise": (
        "its update is not zero without a gradient and whatever its value: noise, or a constant",
        "jaxgrad.param_groups({wrt: tx}), which gives frozen parameters no update at all",
    ),
    "statistics": (
        "the step itself writes it, not the optimizer: running statistics, an average, a clamp",
        "keep frozen layers in inference mode: `jaxgrad.functional(model, wrt=wrt)` does",
    ),
    "rounding": (
        "adding a zero changes it: -0.0 + 0.0 is 0.0, and a subnormal number may be lost",
        "leave it out of the update: gradients with holes and `jaxgrad.apply_updates`",
    ),
}


def of_rows(rows: Sequence[Row], steps: int, coupled: Sequence[str]) -> Iterator[Leak]:
    """The leaks that can be told parameter by parameter.

    Args:
        rows: what was found out.
        steps: the number of steps that were taken.
        coupled: the trained parameters whose updates depend on gradients of frozen ones.
    """
    frozen = [r for r in rows if not r.trained]
    trained = [r for r in rows if r.trained]
    yield from _moved(frozen, steps)
    yield from _ascending(trained)
    yield from _read(frozen, coupled)
    yield from _not_learning(trained, steps)


def _moved(frozen: Sequence[Row], steps: int) -> Iterator[Leak]:
    for cause, (why, fix) in _MOVES.items():
        moved = [r for r in frozen if cause in r.why]
        furthest = max((abs(r.change.largest) for r in moved if r.change), default=0.0)
        if any(r.change for r in moved):
            far = f"by up to {furthest:.3g} " if furthest else "in a bit "
            yield from _leak("moves", moved, f"frozen, and moved {far}in {steps} steps", why, fix)
        else:
            yield from _leak("moves", moved, "frozen, and would move but for its value", why, fix)


def _ascending(trained: Sequence[Row]) -> Iterator[Leak]:
    yield from _leak(
        "ascends",
        [r for r in trained if "raw gradient" in r.why],
        "trained, and moves up its gradient",
        "no transformation takes it with a negative rate: it is outside of a mask or group, or "
        "the chain lacks optax.scale(-learning_rate)",
        "let a group take it; jaxgrad.param_groups lists what each takes by .assign(params)",
    )


def _read(frozen: Sequence[Row], coupled: Sequence[str]) -> Iterator[Leak]:
    """The leaks of frozen parameters that cost something: in a norm, a gradient or state."""
    if coupled:
        share = sum(r.share for r in frozen)
        yield from _leak(
            "norm",
            [r for r in frozen if r.share],
            f"frozen, with {share:.1%} of the squared gradient norm, on which the steps of "
            f"{listed([repr(p) for p in coupled], 3)} depend",
            "a clip by the global norm, or another norm over all leaves, reads frozen gradients "
            "too and scales the trained ones down by them",
            SPLIT,
        )
    yield from _leak(
        "gradient",
        [r for r in frozen if r.gradient == "computed"],
        "frozen, and its gradient is computed in each step",
        "something reads it: a norm, a finite check, an accumulator, momentum, or the end of the "
        "jit that returns it",
        SPLIT,
    )
    held = [r for r in frozen if r.state]
    total = size(sum(r.state for r in held))
    yield from _leak(
        "state",
        held,
        f"frozen, and the optimizer holds {total}",
        "it was initialised on these parameters too",
        SPLIT,
    )


def _not_learning(trained: Sequence[Row], steps: int) -> Iterator[Leak]:
    yield from _leak(
        "unused",
        [r for r in trained if not r.used],
        "trained, and the loss does not depend on it",
        "its path is not part of what the loss computes: a branch that is not taken, a head of "
        "another task, a layer that is not called",
        "take it out of wrt, or use it in the loss",
    )
    yield from _leak(
        "stopped",
        [r for r in trained if r.used and r.gradient in ("zero", "none")],
        "trained, and gets no gradient although the loss depends on it",
        "the gradient ends on its way: stop_gradient, an integer or a comparison; or it was left "
        "out of the differentiation",
        "let the gradient through, or take it out of wrt",
    )
    yield from _leak(
        "stuck",
        [r for r in trained if r.gradient not in ("zero", "none") and r.share and not r.change],
        f"trained, and has not moved in {steps} steps although its gradient is not zero",
        "no group or mask takes it, its rate is zero, or the optimizer accumulates for longer",
        "let a group take it; where the optimizer accumulates or warms up, audit more steps=",
    )


def of_cost(rows: Sequence[Row], spent: Cost, optimum: Cost | None) -> Iterator[Leak]:
    """The leak of a step of one's own that takes more operations than it needs."""
    unknown = any(r.gradient == "unknown" for r in rows)
    if optimum and unknown and spent.flops > _DEAR * optimum.flops:
        yield Leak(
            "cost",
            (),
            f"a step takes {spent.flops / optimum.flops:.2g} times the operations of one that is "
            "split by wrt",
            "gradients of frozen parameters are computed, or leave the jit that makes them",
            SPLIT,
        )


def of_ties(ties: Iterable[tuple[str, str]]) -> Iterator[Leak]:
    """The leaks of parameters that are one and will be two."""
    for pair in ties:
        yield Leak(
            "tied",
            pair,
            "one parameter at two paths",
            "taken apart as a pytree, each copy gets a part of the gradient and they drift apart",
            "`apply, params = jaxgrad.functional(model)` keeps them one; or use one path twice",
        )


def of_statistics(trained: Sequence[str], lost: Sequence[str]) -> Iterator[Leak]:
    """The leaks of running statistics that are trained, or written and dropped."""
    fix = (
        "`apply, params = jaxgrad.functional(model)`: `apply.train` returns the new statistics, "
        "which are no parameters"
    )
    if trained:
        what, why = (
            "a running statistic, and trained",
            "the optimizer moves it by a gradient that means nothing",
        )
        yield Leak("statistics", tuple(trained), what, why, fix)
    if lost:
        what, why = (
            "the loss writes it, and that is lost",
            "a module that goes through jit or grad is a copy; what is written into it is dropped "
            "without a word",
        )
        yield Leak("lost", tuple(lost), what, why, fix)


def of_history(forgotten: Sequence[str], unsaved: Sequence[str]) -> Iterator[Leak]:
    """The leaks between one phase of a training, or one process, and the next."""
    if forgotten:
        yield Leak(
            "forgotten",
            tuple(forgotten),
            "trained before and now, and its optimizer state is new",
            "an optimizer that is initialised again, for another selection, starts from nothing",
            "carry over the state of what is still trained: `jaxgrad.fit(..., checkpoint=..., "
            "resume=True)` does so by path",
        )
    if unsaved:
        yield Leak(
            "unsaved",
            tuple(unsaved),
            "a parameter, and not in what is saved",
            "a half of the parameters was saved: it loads into no model, and not under another wrt",
            "split inside of the step and save the full tree: jaxgrad.save(path, params)",
        )


def _leak(kind: str, rows: Sequence[Row], what: str, why: str, fix: str) -> Iterator[Leak]:
    if rows:
        yield Leak(kind, tuple(r.path for r in rows), what, why, fix)
