"""`jaxgrad predict`: classifies images and arrays."""

import dataclasses
import math
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jaxgrad import data
from jaxgrad._disk.numpy_file import why_unreadable
from jaxgrad.cli._classifier import Classifier


@dataclasses.dataclass(frozen=True)
class Predict:
    """Read digits from image files (PNG, JPEG, ...) or arrays (.npy, .npz).

    Images are converted to greyscale and resized for the model; arrays hold one image or many. The
    models expect light digits on a dark background, as in MNIST: use `--invert` for ink on paper.

    $ jaxgrad predict digit.png
    $ jaxgrad predict scans/*.jpg --invert --from runs/pretrained
    """

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Images or arrays."""
    source: Annotated[Path, tyro.conf.arg(name="from")] = Path("runs/finetuned")
    """The model, as saved by `jaxgrad finetune` or `pretrain`, or a PyTorch file of a module."""
    forward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """How the layers of a PyTorch file run, if the file does not show it; see `finetune`."""
    invert: bool = False
    """Invert light and dark."""

    def run(self) -> None:
        """Reads the files and prints a table of predictions."""
        from rich.console import Console
        from rich.table import Table

        if not self.files:
            raise data.DataError("name at least one image or array file.")
        model = Classifier.load(self.source, self.forward)
        side = math.isqrt(model.config["features"])
        images = {file: _read(file, side) for file in self.files}
        table = Table("file", "row", "digit", "probability")
        for file, rows in images.items():
            rows = 1 - rows if self.invert else rows
            for i, row in enumerate(model.predict(model.params, rows)):
                table.add_row(str(file), str(i), str(row.argmax()), f"{row.max():.1%}")
        Console().print(table)


def _read(file: Path, side: int) -> np.ndarray:
    """Images between 0 and 1, `float32[rows, side, side]`."""
    if not file.exists():
        raise FileNotFoundError(f"no file '{file}'.")
    try:
        array = _array(file) if file.suffix in (".npy", ".npz") else _picture(file, side)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise data.DataError(f"'{file}' can't be read: {why_unreadable(e)}") from e
    if array.dtype.kind not in "biuf":
        raise data.DataError(
            f"'{file}' holds {array.dtype.name}; images are uint8, or numbers between 0 and 1."
        )
    if array.size == 0 or array.size % side**2 or array.shape[-1] not in (side, side**2):
        raise data.DataError(
            f"'{file}' holds {list(array.shape)}; the model takes images of {side} x {side}, "
            f"[{side}, {side}] or [rows, {side}, {side}]."
        )
    images = array.reshape(-1, side, side)
    images = images.astype(np.float32) / (255 if array.dtype == np.uint8 else 1)
    if not (images.min() >= 0 and images.max() <= 1):
        raise data.DataError(
            f"'{file}' holds values from {images.min():g} to {images.max():g}; images are uint8, "
            "or between 0 and 1."
        )
    return images


def _array(file: Path) -> np.ndarray:
    with file.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if len(loaded.files) != 1:
            held = ", ".join(loaded.files) or "nothing"
            raise ValueError(f"it holds {held}; expected one array")
        return loaded[loaded.files[0]]


def _picture(file: Path, side: int) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))
