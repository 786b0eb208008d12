"""The record: what a checkpoint knows beside its arrays, as typed fields with a format version.

The record travels as JSON text in the metadata of the file or of Orbax's tree, with a checksum of
its own. Nothing outside this file knows how a field is written.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxgrad._disk.digest import text_checksum
from jaxgrad._optim.parts import Part

VERSION = 2

Json: TypeAlias = Any
"""Anything that JSON can hold."""

Mode: TypeAlias = Literal["min", "max"]


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read, or put into the tree; the message says why."""

    __module__ = "jaxgrad"


class UnreadableError(CheckpointError):
    """A checkpoint that is not damaged, but that this process can't read as it is set up."""


class Empty(NamedTuple):
    """The dtype and the shape of an array without elements."""

    dtype: str
    shape: tuple[int, ...]


class Position(NamedTuple):
    """How far a stream was read: passes, and in this one steps, rows and the iterator's state."""

    epoch: int = 0
    steps: int = 0
    rows: int = 0
    state: Json = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides which rows a step of `fit` takes.

    Attributes:
        rows: the rows of the dataset; 0 for a stream.
        batch_size: the rows of a step.
        key: the implementation and the words of the PRNG key, or None.
        data: dtype, shape and digest of each array of the dataset, by path; empty for a stream.
    """

    rows: int = 0
    batch_size: int = 0
    key: str | None = None
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What every checkpoint knows beside its arrays.

    Attributes:
        trained: the paths that were trained.
        config: what the user stored with it.
        keys: the implementation of each PRNG key, by path; its words are stored as an array.
        empty: the arrays without elements, by path, which file formats refuse.
        checksums: the checksum of each stored array, by path; None if something other than
            jaxgrad wrote the checkpoint.
    """

    trained: tuple[str, ...] = ()
    config: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    empty: Mapping[str, Empty] = dataclasses.field(default_factory=dict)
    checksums: Mapping[str, int] | None = None

    def to_json(self) -> str:
        """The record as text.

        Raises:
            TypeError, ValueError: JSON can't hold a field.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"version": VERSION, **fields}, default=_as_json)

    @staticmethod
    def from_json(text: str, path: Path) -> "Record":
        """The record that `to_json` wrote, of the class that wrote it.

        Raises:
            UnreadableError: the text has another format version; `path` names the checkpoint.
        """
        fields = json.loads(text)
        if (version := fields.pop("version", None)) != VERSION:
            raise UnreadableError(
                f"the record of '{path}' has format version {version}, and this jaxgrad reads "
                f"version {VERSION}. Read it with the jaxgrad that wrote it, or install the newest."
            )
        fields["trained"] = tuple(fields["trained"])
        fields["empty"] = {p: Empty(d, tuple(shape)) for p, (d, shape) in fields["empty"].items()}
        if "step" not in fields:
            return Record(**fields)
        fields["settings"] = Settings(**fields["settings"])
        fields["positions"] = tuple(Position(*position) for position in fields["positions"])
        fields["parts"] = {
            p: Part(kind, serves if serves is None else tuple(serves))
            for p, (kind, serves) in fields["parts"].items()
        }
        return StepRecord(**fields)

    def to_metadata(self) -> dict[str, str]:
        """The record as a file's metadata holds it."""
        text = self.to_json()
        return {"record": text, "crc32": str(text_checksum(text))}

    @staticmethod
    def from_metadata(metadata: Json, path: Path) -> "Record":
        """The record in a file's metadata; an empty one if something other than jaxgrad wrote it.

        Raises:
            CheckpointError: its checksum is wrong, or see `from_json`.
        """
        held = metadata if isinstance(metadata, dict) else {}
        text, crc = held.get("record"), held.get("crc32")
        if not isinstance(text, str) or not isinstance(crc, str):
            return Record()
        if crc != str(text_checksum(text)):
            raise CheckpointError(f"'{path}' is damaged: the checksum of its record is wrong.")
        return Record.from_json(text, path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """What a step of a run knows besides.

    Attributes:
        step: the number of steps taken.
        settings: what decides which rows the next step takes.
        staged: whether the loss was staged; None if that was not decided.
        positions: how far each process has read a stream.
        parts: what the optimizer's state consists of, by the path of each part's root.
        frozen: the name of the frozen parameters, by their content; empty if there are none.
        metric: what makes a step good: a name in an entry of the history.
        mode: whether the least or the greatest metric is best.
        history: the entries of the history as JSON text, since a save encodes only new entries.
    """

    step: int
    settings: Settings
    staged: bool | None
    positions: tuple[Position, ...]
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    frozen: str = ""
    metric: str = "loss"
    mode: Mode = "min"
    history: str = "[]"

    @property
    def entries(self) -> tuple[dict[str, float], ...]:
        """The history: one entry for each chunk."""
        return tuple(json.loads(self.history))

    def metrics_of(self, metric: str) -> dict[int, float]:
        """A metric by step, of the entries that have it."""
        return {int(e["step"]): e[metric] for e in self.entries if metric in e}


def best_first(metrics: Mapping[int, float], mode: Mode) -> list[int]:
    """The steps from the best metric to the worst, the earlier of two equals first; no NaN."""
    sign = 1 if mode == "min" else -1
    known = sorted(step for step, value in metrics.items() if value == value)
    return sorted(known, key=lambda step: sign * metrics[step])


def _as_json(x: object) -> Json:
    if isinstance(x, Settings):
        return dataclasses.asdict(x)
    if isinstance(x, Mapping):  # of a config: JSON has only dicts
        return dict(x)
    raise TypeError(f"Object of type {type(x).__name__} is not JSON serializable")
