"""A training run on disk: what the next step needs to be taken as if nothing had happened.

    runs/head/frozen/<digest>   the frozen parameters, stored once and named by their content
    runs/head/steps/<step>      what is trained, optimizer state, losses, and a record of the rest

A step costs what is trained, and refers to the frozen part by its digest. Each directory is written
under another name and renamed when it is complete; what is no longer kept is renamed before it is
deleted. So at no moment does a kill leave a part of a step where a step is looked for. A disk can
still damage what was whole: every array has a checksum, and a step that does not match is passed
over for the one before.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxgrad._checkpoint.arrays import (
    CheckpointError,
    decode,
    encode,
    load_arrays,
    read,
    shapes,
    write,
    write_together,
)
from jaxgrad._devices.placement import ShardingOf, on_one_device
from jaxgrad._devices.processes import barrier, from_first, greatest, is_first, several, whole
from jaxgrad._disk.safetensors import raw
from jaxgrad._text import listed, spec
from jaxgrad._tree.flat import PyTree


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where `fit` saves a run, how often, and what of it is kept.

    Attributes:
        directory: the directory of the run.
        every: the number of chunks between two saves; the end of the run is always saved.
        keep: how many of the latest steps to keep, at least 1.
        best: how many of the best steps to keep beside them.
        metric: what makes a step good: a name in its record of the history.
        mode: whether the least or the greatest is best.
        config: anything that JSON can hold, for the record.

    Raises:
        ValueError: `every` or `keep` is below 1, `best` below 0, or there is no such `mode`.

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
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("keep", 1), ("best", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it must be {least} or more.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r}; it must be 'min' or 'max'.")


class Saved(NamedTuple):
    """A step as it was saved; arrays by path."""

    params: dict[str, Any]
    opt_state: dict[str, Any]
    losses: np.ndarray
    record: dict[str, Any]


class Run:
    """The directory of a run, open for saving; a context manager."""

    def __init__(
        self, config: Checkpoints, resume: bool, sharding_of: ShardingOf = on_one_device
    ) -> None:
        """Refuses a directory of something else, or of steps that nobody asked to resume."""
        self.config = config
        self.sharding_of = sharding_of
        self.root = Path(config.directory).absolute()
        self._steps, self._frozen = self.root / "steps", self.root / "frozen"
        if self.root.exists() and not self.root.is_dir():
            raise CheckpointError(f"'{self.root}' is a file. Choose another directory.")
        if self.root.is_dir() and any(self.root.iterdir()) and not self._steps.is_dir():
            raise CheckpointError(f"'{self.root}' holds no run. Choose another directory.")
        if (found := self.steps()) and not resume:
            raise CheckpointError(
                f"'{self.root}' holds a run, of step {found[-1]}. Continue it with resume=True, or "
                "choose another directory."
            )
        self._metrics: dict[int, float] = {}
        self._history: list[str] = []  # as JSON: each save has all of it
        self._digest = ""
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._last = -1

    def __enter__(self) -> "Run":
        if is_first():
            self._steps.mkdir(parents=True, exist_ok=True)
            for left in [*self._steps.iterdir(), *self.root.glob("frozen/*")]:
                if not left.name.isalnum():  # by a kill: a part of a save or of a deletion
                    shutil.rmtree(left, ignore_errors=True)
        barrier("the run is open")
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """The steps that are saved, in order."""
        if not self._steps.is_dir():
            return []
        return sorted(int(p.name) for p in self._steps.iterdir() if p.name.isdecimal())

    def newest(self) -> Saved | None:
        """The newest step that is whole; a damaged one is said, and passed over."""
        for step in from_first(self.steps()[::-1]):
            path = self._steps / str(step)
            saved, why = None, "another process can't read it"
            try:
                saved = self._read(path)
            except Exception as e:  # Orbax and TensorStore report damage by many types
                why = " ".join(str(e).split())[:300]
            if greatest(saved is None):
                if is_first():
                    warnings.warn(
                        f"step {step} of '{self.root}' is damaged and passed over: {why}",
                        stacklevel=2,
                    )
                    _delete(path)
                continue
            assert saved is not None
            self._last = step
            for record in saved.record["history"]:
                self._rank(record)
            return saved
        return None

    def is_due(self, chunks: int) -> bool:
        """Whether to save after so many chunks."""
        return chunks % self.config.every == 0

    def keep_frozen(self, frozen: PyTree) -> None:
        """Stores the frozen parameters, unless they are there: the steps refer to them."""
        self._digest = _digest(frozen)
        if self._digest and not from_first((self._frozen / self._digest).exists()):
            write(self._frozen / self._digest, *_sealed(frozen, {}))

    def save(self, state: PyTree, record: dict[str, Any]) -> None:
        """Saves `{"trained", "opt_state", "losses"}` as `record["step"]`, in the background."""
        if record["step"] == self._last:
            return
        self.wait()
        for entry in record["history"][-1:]:
            self._rank(entry)
        self._last = record["step"]
        path = self._steps / str(record["step"])
        with self._explained():
            self._history += map(json.dumps, record["history"][len(self._history) :])
            record = record | {"history": f"[{','.join(self._history)}]"}
            record |= {"frozen": self._digest, "config": dict(self.config.config)}
            if is_first() and path.exists():
                _delete(path)
            if several():  # what they do together comes between two steps, in one order for all
                response = write_together(path, *_sealed(state, record))
                self._pending = self._writer.submit(self._finish, response)
            else:
                self._pending = self._writer.submit(self._save, path, state, record)

    def wait(self) -> None:
        """Waits for what is being saved, and raises what went wrong with it."""
        pending, self._pending = self._pending, None
        with self._explained():
            if pending is not None:
                pending.result()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            steps = self.steps()
            last = f"the last whole step is {steps[-1]}" if steps else "there is no whole step"
            why = " ".join(str(e).split())[:300]
            raise CheckpointError(
                f"step {self._last} could not be saved in '{self.root}' ({why}); {last}. Make "
                "room, or mend the rights, and continue with resume=True."
            ) from e

    def _save(self, path: Path, state: PyTree, record: Mapping[str, Any]) -> None:
        write(path, *_sealed(state, record))
        self._forget()

    def _finish(self, response: Any) -> None:
        response.result()
        if is_first():
            self._forget()

    def _forget(self) -> None:
        """Deletes the steps that are not kept."""
        kept = self._kept()
        for step in self.steps():
            if step not in kept:
                _delete(self._steps / str(step))

    def _read(self, path: Path) -> Saved:
        arrays, record = _restore(path, self.sharding_of)
        params = _frozen_part(self.root, record, self.sharding_of) | _under("trained", arrays)
        record["history"] = json.loads(record["history"])
        losses = np.asarray(arrays["losses"])
        return Saved(params, _under("opt_state", arrays), losses, record)

    def _rank(self, entry: Mapping[str, float]) -> None:
        if self.config.metric in entry:
            self._metrics[int(entry["step"])] = entry[self.config.metric]

    def _kept(self) -> set[int]:
        steps = self.steps()
        sign = 1 if self.config.mode == "min" else -1
        ranked = sorted(
            (step for step in steps if step in self._metrics),
            key=lambda step: sign * self._metrics[step],
        )
        return {*steps[-self.config.keep :], *ranked[: self.config.best]}


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run."""
    return (path / "steps").is_dir()


def params_of(path: Path) -> dict[str, Any]:
    """All parameters of the newest step, by path."""
    arrays, record = _restore(_newest(path))
    return _frozen_part(path, record) | _under("trained", arrays)


def shapes_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes and dtypes of `params_of`, and the record of the newest step."""
    found, record = read(_newest(path))
    frozen = shapes(*read(path / "frozen" / record["frozen"])) if record["frozen"] else {}
    return frozen | _under("trained", shapes(found, record)), record


def _frozen_part(
    path: Path, record: Mapping[str, Any], sharding_of: ShardingOf = on_one_device
) -> dict[str, Any]:
    digest = record["frozen"]
    return _restore(path / "frozen" / digest, sharding_of)[0] if digest else {}


def _newest(path: Path) -> Path:
    steps = [int(p.name) for p in (path / "steps").iterdir() if p.name.isdecimal()]
    if not steps:
        raise CheckpointError(f"'{path}' is a run of which no step is saved.")
    return path / "steps" / str(max(steps))


def _under(node: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves below a node; the node itself, where it is one, by the empty path."""
    return {
        p[len(node) + 1 :]: x for p, x in leaves.items() if p == node or p.startswith(node + "/")
    }


def _sealed(tree: PyTree, record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a tree by path, and the record with their checksums."""
    arrays, kinds = encode(tree)
    return arrays, {**record, **kinds, "checksums": _checksums(arrays)}


def _restore(
    path: Path, sharding_of: ShardingOf = on_one_device
) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, (_, record) = load_arrays(path, sharding_of), read(path)
    sums = _checksums(arrays)
    if damaged := [p for p, crc in record["checksums"].items() if sums.get(p) != crc]:
        raise CheckpointError(f"the checksum of {listed(map(repr, damaged))} is wrong")
    return decode(arrays, record), record


def _checksums(arrays: Mapping[str, Any]) -> dict[str, int]:
    return {p: zlib.crc32(raw(whole(x))) for p, x in arrays.items()}


def _digest(tree: PyTree) -> str:
    """A name by content: equal for equal paths, dtypes, shapes and bits; none for no arrays."""
    arrays, _ = encode(tree)
    digest = hashlib.blake2b(digest_size=16)
    for path, x in arrays.items():
        digest.update(f"{path} {spec(x)}\n".encode())
        digest.update(raw(whole(x)))
    return digest.hexdigest() if arrays else ""


def _delete(path: Path) -> None:
    """Deletes a directory under another name, so that a kill leaves no half of it under its own."""
    gone = path.with_name(f"{path.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)
