"""A training run on disk: what the next step needs to be taken as if nothing had happened.

    runs/head/frozen/<name>   the frozen parameters, stored once and named by their content
    runs/head/steps/<step>    what is trained, the optimizer state, the losses, and a record

A step costs what is trained, and refers to the frozen parameters by their name. Directories appear
and disappear atomically, so that a kill never leaves a part of a step where a step is looked for. A
disk can still damage what was complete: every array has a checksum, and a step that does not match
is passed over for the one before.
"""

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import jax
import numpy as np

from jaxgrad._checkpoint.arrays import (
    Response,
    Stored,
    encode,
    load_leaves,
    read,
    shapes,
    write,
    write_together,
)
from jaxgrad._checkpoint.record import (
    CheckpointError,
    Json,
    Record,
    StepRecord,
    UnreadableError,
    best_first,
)
from jaxgrad._devices.placement import ShardingOf, on_one_device
from jaxgrad._devices.processes import barrier, from_first, greatest, is_first, several, whole
from jaxgrad._disk.atomic import remove_directory
from jaxgrad._disk.digest import content_name
from jaxgrad._text import listed
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.pattern import is_within

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where `fit` saves a run, how often, and which steps it keeps.

    Attributes:
        directory: the directory of the run.
        every: the number of chunks between two saves; the end of the run is always saved.
        keep: how many of the latest steps to keep, at least 1.
        best: how many of the best steps to keep beside them.
        metric: what makes a step good: a name in its entry of the history.
        mode: whether the least or the greatest is best.
        config: anything that JSON can hold, for the record.

    Raises:
        ValueError: `every` or `keep` is below 1, `best` is below 0, or `mode` is unknown.

    Example:
        >>> import jaxgrad as jg
        >>> jg.Checkpoints("runs/head", keep=2, best=1, metric="accuracy", mode="max").keep
        2

    Source: Keras's `ModelCheckpoint` and Orbax's preservation policies.
    """

    directory: str | PathLike[str]
    _: dataclasses.KW_ONLY
    every: int = 1
    keep: int = 2
    best: int = 0
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    config: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be {least} or more.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r}; it must be 'min' or 'max'.")


class Saved(NamedTuple):
    """A step as it was saved; arrays by path."""

    params: dict[str, jax.Array]
    opt_state: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    losses: np.ndarray
    metrics: dict[str, np.ndarray]
    record: StepRecord


class Run:
    """The directory of a run, open for saving; a context manager.

    Args:
        config: the directory, and what to keep of the run.
        resume: whether the directory may hold steps.
        sharding_of: where the arrays of a resumed run go.

    Raises:
        CheckpointError: the directory holds something else, or steps that nobody asked to resume.
    """

    def __init__(
        self, config: Checkpoints, resume: bool, sharding_of: ShardingOf = on_one_device
    ) -> None:
        self.config = config
        self.sharding_of = sharding_of
        self.root = Path(config.directory).absolute()
        if self.root.exists() and not self.root.is_dir():
            raise CheckpointError(f"'{self.root}' is a file. Choose another directory.")
        if self.root.is_dir() and any(self.root.iterdir()) and not is_run(self.root):
            raise CheckpointError(f"'{self.root}' does not hold a run. Choose another directory.")
        if (found := steps_of(self.root)) and not resume:
            raise CheckpointError(
                f"'{self.root}' holds a run, of step {found[-1]}. Continue it with resume=True, or "
                "choose another directory."
            )
        self._metrics: dict[int, float] = {}
        self._history: list[str] = []  # as JSON: each save has all of it
        self._frozen = ""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last = -1
        self._damaged: set[int] = set()

    def __enter__(self) -> "Run":
        if is_first():
            steps = self.root / "steps"
            steps.mkdir(parents=True, exist_ok=True)
            for left in [*steps.iterdir(), *self.root.glob("frozen/*")]:
                if not left.name.isalnum():  # by a kill: a part of a save or of a deletion
                    shutil.rmtree(left, ignore_errors=True)
        barrier("the run is open")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def newest(self) -> Saved | None:
        """The newest step that is not damaged; a warning names each that is, and it stays.

        Raises:
            UnreadableError: a step is not damaged, but this process can't read it.
        """
        for step in from_first(steps_of(self.root)[::-1]):
            saved, why = None, "another process can't read it"
            try:
                saved = self._read(step)
            except UnreadableError:
                raise
            except Exception as e:  # Orbax and TensorStore report damage by many types
                why = _in_one_line(e)
            if greatest(saved is None):
                if is_first():
                    warnings.warn(
                        f"step {step} of '{self.root}' is damaged and passed over: {why}",
                        stacklevel=2,
                    )
                self._damaged.add(step)
                continue
            assert saved is not None
            self._last = step
            self._metrics = saved.record.metrics_of(self.config.metric)
            return saved
        return None

    def values(
        self, step: int, trained: Collection[str]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What may differ in a step: the leaves trained then or now, and statistics; by path.

        Raises:
            CheckpointError: the step is not saved, or it is damaged.
        """
        steps = from_first(steps_of(self.root))
        if step not in steps:
            there = listed(map(str, steps)) or "none"
            raise CheckpointError(f"'{self.root}' does not hold this step, but {there}.")
        params = params_of(self.root, step)
        leaves = params.load({*params.record.trained, *trained}, self.sharding_of)
        stored, _ = params.parts[-1]
        stats = Parameters(params.record, [(stored, "stats")]).load(None, self.sharding_of)
        return leaves, stats

    def is_due(self, chunks: int) -> bool:
        """Whether to save after so many chunks."""
        return chunks % self.config.every == 0

    def keep_frozen(self, frozen: PyTree) -> None:
        """Stores the frozen parameters, which the steps refer to, unless they are stored."""
        tree = encode(frozen)
        if not tree.arrays:
            return
        self._frozen = content_name((p, whole(x)) for p, x in tree.arrays.items())
        path = self.root / "frozen" / self._frozen
        # Where a step can't be read, this may be what is damaged.
        if self._damaged or not from_first(path.exists()):
            write(path, tree, Record())

    def save(
        self, state: PyTree, record: StepRecord, history: Sequence[Mapping[str, float]]
    ) -> None:
        """Saves a step in the background.

        Args:
            state: `{"trained", "opt_state", "stats", "losses", "metrics"}`.
            record: what `fit` knows of the step.
            history: the history up to it.

        Raises:
            CheckpointError: the step before could not be saved.
        """
        if record.step == self._last:
            return
        self.wait()
        for entry in history[-1:]:
            if self.config.metric in entry:
                self._metrics[int(entry["step"])] = entry[self.config.metric]
        self._last = record.step
        self._damaged.discard(record.step)
        path = _step(self.root, record.step)
        with self._explained():
            self._history += map(json.dumps, history[len(self._history) :])
            record = dataclasses.replace(
                record,
                history=f"[{','.join(self._history)}]",
                frozen=self._frozen,
                config=self.config.config,
                metric=self.config.metric,
                mode=self.config.mode,
            )
            if several():
                if is_first() and path.exists():  # a step before the run was resumed
                    remove_directory(path)
                # All processes do this between the same two steps, and only the wait is apart.
                response = write_together(path, encode(state), record)
                self._pending = self._writer.submit(self._finish, response)
            else:
                self._pending = self._writer.submit(self._save, path, state, record)

    def wait(self) -> None:
        """Waits for the step that is being saved.

        Raises:
            CheckpointError: it could not be saved.
        """
        pending, self._pending = self._pending, None
        with self._explained():
            if pending is not None:
                pending.result()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            steps = self._complete()
            last = f"the last complete step is {steps[-1]}" if steps else "no step is complete"
            why = _in_one_line(e)
            raise CheckpointError(
                f"step {self._last} could not be saved in '{self.root}' ({why}); {last}. Free "
                "space, or fix the permissions, and continue with resume=True."
            ) from e

    def _save(self, path: Path, state: PyTree, record: StepRecord) -> None:
        write(path, encode(state), record)
        self._forget()

    def _finish(self, response: Response) -> None:
        response.result()
        if is_first():
            self._forget()

    def _forget(self) -> None:
        """Deletes the steps that are not kept, but none because it could not be read."""
        steps = self._complete()
        best = best_first({s: x for s, x in self._metrics.items() if s in steps}, self.config.mode)
        kept = {*steps[-self.config.keep :], *best[: self.config.best]}
        for step in steps:
            if step not in kept:
                remove_directory(_step(self.root, step))

    def _complete(self) -> list[int]:
        return [step for step in steps_of(self.root) if step not in self._damaged]

    def _read(self, step: int) -> Saved:
        stored, record = _open(self.root, step)
        arrays = load_leaves(stored, None, self.sharding_of)
        params = under("trained", arrays)
        if frozen := _frozen_of(self.root, record):
            params = load_leaves(frozen, None, self.sharding_of) | params
        return Saved(
            params=params,
            opt_state=under("opt_state", arrays),
            stats=under("stats", arrays),
            losses=np.asarray(arrays["losses"]),
            metrics={name: np.asarray(x) for name, x in under("metrics", arrays).items()},
            record=record,
        )


# Reading the parameters of a run like those that `save` wrote.


class Parameters(NamedTuple):
    """The parameters of a checkpoint, open for reading.

    Attributes:
        record: what the checkpoint knows beside its arrays.
        parts: where they are stored, and below which node there.
    """

    record: Record
    parts: Sequence[tuple[Stored, str]]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and the dtype of each, by path."""
        found: dict[str, jax.ShapeDtypeStruct] = {}
        for stored, node in self.parts:
            found |= under(node, shapes(stored))
        return found

    def load(
        self, paths: Collection[str] | None = None, sharding_of: ShardingOf = on_one_device
    ) -> dict[str, jax.Array]:
        """Those at `paths`, or all of them, by path."""
        found: dict[str, jax.Array] = {}
        for stored, node in self.parts:
            here = None if paths is None else {"/".join(filter(None, (node, p))) for p in paths}
            found |= under(node, load_leaves(stored, here, sharding_of))
        return found


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return (path / "steps").is_dir()


def steps_of(path: Path) -> list[int]:
    """The steps of a run that are saved, in order."""
    if not is_run(path):
        return []
    return sorted(int(p.name) for p in (path / "steps").iterdir() if p.name.isdecimal())


def params_of(path: Path, step: int | Literal["best"] | None) -> Parameters:
    """The parameters of a step of a run: the newest if None.

    Raises:
        CheckpointError: there is no such step; the message names those that are saved.
    """
    steps = steps_of(path)
    if not steps:
        raise CheckpointError(f"the run in '{path}' has no saved step.")
    if step is None:
        step = steps[-1]
    elif step == "best":
        step = _best(path, steps)
    if step not in steps:
        raise CheckpointError(
            f"step={step!r}: the run in '{path}' has the steps {listed(map(str, steps))}. Pass one "
            'of them, "best", or None for the newest.'
        )
    stored, record = _open(path, step)
    parts = [(stored, "trained")]
    if frozen := _frozen_of(path, record):
        parts = [(frozen, ""), *parts]
    return Parameters(record, parts)


def _best(path: Path, steps: Sequence[int]) -> int:
    """The best of the steps, by the history of the newest, which has the entries of them all."""
    _, newest = _open(path, steps[-1])
    metrics = {s: x for s, x in newest.metrics_of(newest.metric).items() if s in steps}
    if not metrics:
        found = dict.fromkeys(name for entry in newest.entries for name in entry)
        raise CheckpointError(
            f"step='best': the run in '{path}' has the steps {listed(map(str, steps))}, and none "
            f"has {newest.metric!r} in the history, which has {listed(map(repr, found))}. Pass "
            "one of these as Checkpoints(metric=...) in the next run, or load a step by its number."
        )
    return best_first(metrics, newest.mode)[0]


def under(node: str, leaves: Mapping[str, T]) -> dict[str, T]:
    """The leaves below a node; the node itself, if it is a leaf, by the empty path."""
    if not node:
        return dict(leaves)
    return {p[len(node) + 1 :]: x for p, x in leaves.items() if is_within(p, node)}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _open(path: Path, step: int) -> tuple[Stored, StepRecord]:
    stored = read(_step(path, step))
    if not isinstance(stored.record, StepRecord):
        raise CheckpointError(f"'{stored.path}' is not a step of a run: it has no record of one.")
    return stored, stored.record


def _frozen_of(path: Path, record: StepRecord) -> Stored | None:
    return read(path / "frozen" / record.frozen) if record.frozen else None


def _step(path: Path, step: int) -> Path:
    return path / "steps" / str(step)
