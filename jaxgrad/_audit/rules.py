"""What can be wrong with a training step: a rule per kind of leak, with its reason and fix."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jaxgrad._audit.cost import Cost
from jaxgrad._audit.liveness import Liveness
from jaxgrad._text import listed, size
from jaxgrad._tree.bitwise import Change


@dataclasses.dataclass(frozen=True)
class Row:
    """What an audit found about one parameter.

    Attributes:
        path: its path.
        spec: dtype and shape, `float32[3,2]`.
        trained: whether it is meant to be trained.
        used: whether the loss depends on its value.
        gradient: "computed"; "dropped" if nothing reads it, so that XLA eliminates it; "zero" if it
            is a constant zero; "none" if there is no gradient; "unknown" if the user's own step
            computes it.
        share: its share of the squared global norm of the gradients, 0 to 1.
        state: bytes that the optimizer holds for it.
        change: how it differs after some steps, None if it is bit-identical.
        why: what moves it, some of "gradient", "raw gradient", "decay", "momentum", "noise"
            (found by experiment, so possibly before the value has changed); "statistics" if the
            step itself writes it; "rounding" if adding zero changed a bit.
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
    """A frozen parameter that moves or costs something, or a trained one that can't learn.

    Attributes:
        kind: "moves", "ascends", "norm", "gradient", "state", "unused", "stopped", "stuck",
            "tied", "statistics", "lost", "forgotten", "unsaved" or "cost".
        paths: the parameters at fault; empty if it is the whole step.
        what: what is wrong.
        why: the cause.
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


_DEAR = 1.2  # a step may take this many times the operations that it needs

SPLIT = (
    "differentiate only the trained half, `jaxgrad.value_and_grad(loss, wrt)`, and initialise the "
    "optimizer on it, `tx.init(jaxgrad.partition(params, wrt)[0])`"
)

_MOVES = {
    "decay": (
        "weight decay: its update depends on its value even when its gradient is zero",
        "apply the decay to trained parameters only: jaxgrad.param_groups({wrt: tx}), or the "
        "decay's own mask=",
    ),
    "raw gradient": (
        "its raw gradient passes through: where the mask is False, optax.masked returns its input "
        "unchanged, so the parameter moves up the loss",
        "give frozen parameters zero updates: jaxgrad.param_groups({wrt: tx}), or "
        "optax.partition with optax.set_to_zero",
    ),
    "gradient": (
        "it has a gradient, and the optimizer applies it",
        "jaxgrad.param_groups({wrt: tx}), or pass tx only the trained half",
    ),
    "momentum": (
        "momentum: the optimizer's state keeps moving it when its gradient is zero",
        "keep no state for it: initialise on `jaxgrad.partition(params, wrt)[0]`",
    ),
    "noise": (
        "its update is nonzero even if its gradient and value are zero: noise, or a constant",
        "jaxgrad.param_groups({wrt: tx}), which gives frozen parameters no update at all",
    ),
    "statistics": (
        "the step itself writes it, not the optimizer: running statistics, an average, a clamp",
        "keep frozen layers in inference mode: `jaxgrad.functional(model, wrt=wrt)` does so",
    ),
    "rounding": (
        "adding zero changes it: -0.0 + 0.0 is 0.0, and a subnormal may be flushed to zero",
        "leave it out of the update: use gradients with holes and `jaxgrad.apply_updates`",
    ),
}


def of_rows(rows: Sequence[Row], steps: int, coupled: Sequence[str]) -> Iterator[Leak]:
    """The leaks found parameter by parameter.

    Args:
        rows: what was found.
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
            how = f"moved by up to {furthest:.3g}" if furthest else "changed only in its bits"
            yield from _leak("moves", moved, f"frozen, but {how} in {steps} steps", why, fix)
        else:
            what = "frozen, and only its present value keeps it from moving"
            yield from _leak("moves", moved, what, why, fix)


def _ascending(trained: Sequence[Row]) -> Iterator[Leak]:
    yield from _leak(
        "ascends",
        [r for r in trained if "raw gradient" in r.why],
        "trained, but moves up its gradient",
        "no transformation scales its gradient by a negative rate: it is outside every mask or "
        "group, or the chain lacks optax.scale(-learning_rate)",
        "add it to a group; jaxgrad.param_groups(...).assign(params) lists what each group takes",
    )


def _read(frozen: Sequence[Row], coupled: Sequence[str]) -> Iterator[Leak]:
    """The leaks of frozen parameters that cost something: a norm, a gradient or state."""
    if coupled:
        share = sum(r.share for r in frozen)
        yield from _leak(
            "norm",
            [r for r in frozen if r.share],
            f"frozen, but makes up {share:.1%} of the squared gradient norm, on which the steps of "
            f"{listed([repr(p) for p in coupled], 3)} depend",
            "clipping by the global norm, or another norm over all leaves, includes frozen "
            "gradients, so the trained ones are scaled down too far",
            SPLIT,
        )
    yield from _leak(
        "gradient",
        [r for r in frozen if r.gradient == "computed"],
        "frozen, but its gradient is computed in each step",
        "something reads it: a norm, a finite check, an accumulator, momentum, or the jit that "
        "returns it",
        SPLIT,
    )
    held = [r for r in frozen if r.state]
    total = size(sum(r.state for r in held))
    yield from _leak(
        "state",
        held,
        f"frozen, but the optimizer holds {total} of state for it",
        "the optimizer was initialised on frozen parameters too",
        SPLIT,
    )


def _not_learning(trained: Sequence[Row], steps: int) -> Iterator[Leak]:
    yield from _leak(
        "unused",
        [r for r in trained if not r.used],
        "trained, but the loss does not depend on it",
        "the loss never uses it: a branch that is not taken, the head of another task, a layer "
        "that is not called",
        "remove it from wrt, or use it in the loss",
    )
    yield from _leak(
        "stopped",
        [r for r in trained if r.used and r.gradient in ("zero", "none")],
        "trained, but gets no gradient although the loss depends on it",
        "something cuts the gradient off: stop_gradient, an integer or a comparison; or it was "
        "left out of the differentiation",
        "let the gradient through, or remove it from wrt",
    )
    yield from _leak(
        "stuck",
        [r for r in trained if r.gradient not in ("zero", "none") and r.share and not r.change],
        f"trained, but has not moved in {steps} steps although its gradient is not zero",
        "no group or mask takes it, its learning rate is zero, or the optimizer accumulates over "
        "more steps",
        "add it to a group; if the optimizer accumulates or warms up, audit with a larger steps=",
    )


def of_cost(rows: Sequence[Row], spent: Cost, optimum: Cost | None) -> Iterator[Leak]:
    """The leak of a user's own step that takes more operations than it needs."""
    unknown = any(r.gradient == "unknown" for r in rows)
    if optimum and unknown and spent.flops > _DEAR * optimum.flops:
        yield Leak(
            "cost",
            (),
            f"a step takes {spent.flops / optimum.flops:.2g} times the operations of one that is "
            "split by wrt",
            "gradients of frozen parameters are computed, or returned by the jit that makes them",
            SPLIT,
        )


def of_ties(ties: Iterable[tuple[str, str]]) -> Iterator[Leak]:
    """The leaks of tied parameters that training would separate."""
    for pair in ties:
        yield Leak(
            "tied",
            pair,
            "one parameter at two paths",
            "flattened as a pytree, each copy gets part of the gradient and the two drift apart",
            "`apply, params = jaxgrad.functional(model)` keeps them tied; or store one leaf and "
            "use it twice",
        )


def of_statistics(trained: Sequence[str], lost: Sequence[str]) -> Iterator[Leak]:
    """The leaks of running statistics that are trained, or written and dropped."""
    fix = (
        "`apply, params = jaxgrad.functional(model)`: `apply.train` returns the new statistics, "
        "which are not parameters"
    )
    if trained:
        what, why = (
            "a running statistic, but trained",
            "the optimizer moves it by a meaningless gradient",
        )
        yield Leak("statistics", tuple(trained), what, why, fix)
    if lost:
        what, why = (
            "the loss writes it, but the write is lost",
            "a module passed through jit or grad is a copy; what is written into it is dropped "
            "silently",
        )
        yield Leak("lost", tuple(lost), what, why, fix)


def of_history(forgotten: Sequence[str], unsaved: Sequence[str]) -> Iterator[Leak]:
    """The leaks between one phase of training, or one process, and the next."""
    if forgotten:
        yield Leak(
            "forgotten",
            tuple(forgotten),
            "trained before and now, but its optimizer state is new",
            "an optimizer that is initialised again, for another selection, starts from scratch",
            "carry over the state of what is still trained: `jaxgrad.fit(..., checkpoint=..., "
            "resume=True)` does so by path",
        )
    if unsaved:
        yield Leak(
            "unsaved",
            tuple(unsaved),
            "a parameter, but not saved",
            "only half of the parameters were saved: a model, or another wrt, needs the rest too",
            "split inside the step and save the full tree: jaxgrad.save(path, params)",
        )


def _leak(kind: str, rows: Sequence[Row], what: str, why: str, fix: str) -> Iterator[Leak]:
    if rows:
        yield Leak(kind, tuple(r.path for r in rows), what, why, fix)
