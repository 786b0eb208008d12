"""What a command checks before it reads, trains or writes anything.

A mistake found after the training costs the training. So numbers are checked against a table, one
line for each option, and files are tried where they will be written.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrad import data
from jaxgrad._disk.writable import refuse_unwritable
from jaxgrad._text import listed

_INF = math.inf

# The least and the greatest value of each option that is a number, whichever command has it.
_LIMITS: Mapping[str, tuple[float, float]] = {
    "batch_size": (1, _INF),
    "classes": (0, 9999),
    "clip": (0, _INF),
    "depth": (0, _INF),
    "epochs": (1, _INF),
    "hidden": (1, _INF),
    "learning_rate": (0, _INF),
    "momentum": (0, 1),
    "num_processes": (1, _INF),
    "patience": (0, _INF),
    "process_id": (0, _INF),
    "seed": (0, 2**32 - 1),  # JAX drops the bits above
    "steps": (1, _INF),
    "weight_decay": (0, _INF),
}

_PLOTS = (".png", ".svg", ".pdf")


def check_numbers(command: Any) -> None:
    """Raises if an option of a command, a dataclass, is a number out of its range.

    Raises:
        ValueError: the message names the option as it is typed.
    """
    for field in dataclasses.fields(command):
        if field.name not in _LIMITS:
            continue
        value = getattr(command, field.name)
        least, most = _LIMITS[field.name]
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not (least <= number <= most and math.isfinite(number)):
                range_ = f"{least} or more" if most == _INF else f"from {least} to {most}"
                option = field.name.replace("_", "-")
                raise ValueError(f"--{option} {number}; it must be {range_}.")


def check_output(option: str, path: Path | None) -> None:
    """Raises if no file or directory can be made at the path of an option.

    Raises:
        OSError: the message names the option and the path.
    """
    if path is None:
        return
    try:
        refuse_unwritable(path)
    except OSError as e:
        raise type(e)(f"{option}: {e}") from e


def check_file(option: str, path: Path | None) -> None:
    """Raises if the path of an option is a directory, or no file can be made there.

    Raises:
        OSError: the message names the option and the path.
    """
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a directory; name a file.")
    check_output(option, path)


def check_plot(path: Path | None) -> None:
    """Raises if no plot can be drawn in a file.

    Raises:
        ValueError: its suffix is not that of a picture.
        OSError: it can't be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in _PLOTS:
        suffix = f"ends in '{path.suffix}'" if path.suffix else "has no suffix"
        raise ValueError(f"--plot {path} {suffix}; a plot is saved as {', '.join(_PLOTS)}.")
    check_file("--plot", path)
    import matplotlib.figure  # noqa: F401


def check_apart(out: Path, **others: Path | None) -> None:
    """Raises if another output lies within `--out`, which appears whole, at the end.

    Raises:
        ValueError: the message names the option of that output.
    """
    for name, path in others.items():
        if path is not None and path.absolute().is_relative_to(out.absolute()):
            raise ValueError(
                f"--{name} {path} is within --out {out}, which the model is to fill alone. Put "
                "it elsewhere."
            )


def check_classes(classes: Collection[int], rows: data.Dataset) -> None:
    """Raises if the data has no example of a class.

    Raises:
        DataError: the message names the classes that are missing.
    """
    held = set(np.unique(rows["label"]).tolist())
    if missing := sorted({*classes} - held):
        raise data.DataError(
            f"--classes: the data has no example with the label {listed(map(str, missing))}."
        )
