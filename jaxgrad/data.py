"""Labelled images: scikit-learn's digits, MNIST from the user's files, and noise.

A dataset is any pytree of arrays that share their first axis; here `{"image", "label"}`, with
images in float32 between 0 and 1, `[rows, 28, 28]`, and labels in int32, `[rows]`. Nothing is
downloaded: MNIST is read from files in the formats it is distributed in.
"""

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxgrad._disk import numpy_file

Dataset: TypeAlias = dict[str, np.ndarray]

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IDX_FILES = {
    ("train", "image"): "train-images-idx3-ubyte",
    ("train", "label"): "train-labels-idx1-ubyte",
    ("test", "image"): "t10k-images-idx3-ubyte",
    ("test", "label"): "t10k-labels-idx1-ubyte",
}


class DataError(ValueError):
    """A data file that can't be used: the message names the file and the fault."""


class Splits(NamedTuple):
    """A training set and a test set."""

    train: Dataset
    test: Dataset


def digits(classes: Collection[int] = range(10)) -> Splits:
    """Returns scikit-learn's 1,797 handwritten digits, resized from 8 x 8 to 28 x 28.

    Args:
        classes: the digits to keep. Labels stay the digits themselves.

    Returns:
        Every fifth example as `test`, the others as `train`.

    Raises:
        DataError: `classes` has none of the digits 0 to 9.
        ModuleNotFoundError: scikit-learn is missing.

    Example:
        >>> from jaxgrad.data import digits
        >>> train, test = digits(range(5))
        >>> train["image"].shape, test["image"].shape, sorted(set(train["label"].tolist()))
        ((720, 28, 28), (181, 28, 28), [0, 1, 2, 3, 4])

    Source: the test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C.
    Kaynak, UCI Machine Learning Repository, 1998, as `sklearn.datasets.load_digits` has it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "the embedded digits come with scikit-learn, which is not installed: "
            "pip install 'jaxgrad[cli]'"
        ) from e
    small, labels = load_digits(return_X_y=True)
    keep = np.isin(labels, list(classes))
    if not keep.any():
        raise DataError(f"classes={list(classes)} leaves no digit; the digits are 0 to 9.")
    image = _resize(small[keep].reshape(-1, 8, 8) / 16)
    label = labels[keep].astype(np.int32)
    test = np.arange(len(label)) % 5 == 0
    return Splits(
        {"image": image[~test], "label": label[~test]}, {"image": image[test], "label": label[test]}
    )


def mnist(path: str | PathLike[str], classes: Collection[int] = range(10)) -> Splits:
    """Returns MNIST, Fashion-MNIST or a dataset of the same form from files.

    Args:
        path: a directory with the four IDX files (`train-images-idx3-ubyte` and so on, with
            `.gz` or without, `.` or `-` before `idx`), or an `.npz` file with `x_train`,
            `y_train`, `x_test`, `y_test`, or a directory with one such file.
        classes: the labels to keep.

    Returns:
        The training and test sets; `uint8` images are divided by 255.

    Raises:
        FileNotFoundError: the files do not exist (the message names the expected ones).
        DataError: a file has the wrong magic number, is too short or too long, lacks an array, or
            images and labels differ in number.

    Example:
        >>> from jaxgrad.data import mnist
        >>> train, test = mnist("data/mnist")           # doctest: +SKIP

    Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits"; the
    `.npz` form is Keras's.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no data at '{path}': there is no such file or directory.")
    arrays = _read_npz(path) if path.is_file() else _read_directory(path)
    splits = {}
    for split in ("train", "test"):
        image, label = arrays[split, "image"], arrays[split, "label"]
        if image.ndim != 3 or label.ndim != 1 or len(image) != len(label):
            raise DataError(
                f"'{path}': the {split} images are {list(image.shape)} and the labels "
                f"{list(label.shape)}; expected [rows, height, width] and [rows], with "
                "as many images as labels."
            )
        if image.dtype.kind not in "biuf" or label.dtype.kind not in "iu":
            raise DataError(
                f"'{path}': the {split} images are {image.dtype.name} and the labels "
                f"{label.dtype.name}; expected real numbers and integers."
            )
        keep = np.isin(label, list(classes))
        if not keep.any():
            raise DataError(f"'{path}': no {split} row has a label in {list(classes)}.")
        scale = 255 if image.dtype == np.uint8 else 1
        splits[split] = {
            "image": image[keep].astype(np.float32) / np.float32(scale),
            "label": label[keep].astype(np.int32),
        }
    return Splits(**splits)


def noise(rows: int = 64, *, seed: int = 0) -> Dataset:
    """Returns random images and random targets, like those the PyTorch tutorial trains on.

    Args:
        rows: the number of examples.
        seed: the seed of the generator.

    Returns:
        `{"image": float32[rows, 28, 28], "target": float32[rows, 10]}`, uniform in [0, 1).

    Example:
        >>> from jaxgrad.data import noise
        >>> {name: array.shape for name, array in noise().items()}
        {'image': (64, 28, 28), 'target': (64, 10)}

    Source: `torch.rand(64, 784)` and `torch.rand(64, 10)`.
    """
    rng = np.random.default_rng(seed)
    return {
        "image": rng.random((rows, 28, 28), np.float32),
        "target": rng.random((rows, 10), np.float32),
    }


def read_idx(path: str | PathLike[str]) -> np.ndarray:
    """Reads an array from a file in IDX format, gzipped or not.

    Args:
        path: the file.

    Returns:
        The array, in its dtype and this machine's byte order.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is not an IDX file, is too short, or is too long.

    Example:
        >>> from jaxgrad.data import read_idx
        >>> labels = read_idx("t10k-labels-idx1-ubyte.gz")    # doctest: +SKIP

    Source: the format is described with "The MNIST database of handwritten digits".
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (gzip.BadGzipFile, EOFError, OSError, zlib.error) as e:
        if isinstance(e, FileNotFoundError):
            raise
        raise DataError(f"'{path}' can't be read: {e}") from e
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise DataError(
            f"'{path}' is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}, and "
            "an IDX file with 00 00, a type (08 for bytes) and the number of axes."
        )
    dtype, ndim = np.dtype(_IDX_DTYPES[raw[2]]), raw[3]
    start = 4 + 4 * ndim
    if len(raw) < start:
        raise DataError(f"'{path}' is too short: {len(raw)} bytes can't hold its {ndim} sizes.")
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) != expected:
        state = "is too short" if len(raw) < expected else "is too long"
        raise DataError(
            f"'{path}' {state}: {len(raw):,} bytes; {list(shape)} of {dtype.name} and the "
            f"header take {expected:,}."
        )
    array = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _read_directory(path: Path) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    for key, name in _IDX_FILES.items():
        spellings = [s + end for s in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
        found[key] = next((path / s for s in spellings if (path / s).is_file()), None)
    if all(found.values()):
        return {key: read_idx(file) for key, file in found.items() if file}
    archives = sorted(path.glob("*.npz"))
    if len(archives) == 1 and not any(found.values()):
        return _read_npz(archives[0])
    missing = [_IDX_FILES[key] for key, file in found.items() if file is None]
    raise FileNotFoundError(
        f"'{path}' lacks {', '.join(missing)} (with .gz or without), and has "
        f"{len(archives) or 'no'} .npz file{'s' * (len(archives) > 1)}; expected the four IDX "
        "files of MNIST, or one .npz."
    )


def _read_npz(path: Path) -> dict[tuple[str, str], np.ndarray]:
    names = {
        (split, kind): f"{letter}_{split}"
        for split in ("train", "test")
        for kind, letter in (("image", "x"), ("label", "y"))
    }
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := [name for name in names.values() if name not in archive.files]:
                raise DataError(
                    f"'{path}' has no {', '.join(missing)}; it has "
                    f"{', '.join(archive.files) or 'nothing'}."
                )
            return {key: archive[name] for key, name in names.items()}
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(
            f"'{path}' is not an .npz file, or is damaged: {numpy_file.why_unreadable(e)}."
        ) from e


def _resize(images: np.ndarray, to: int = 28) -> np.ndarray:
    """Bilinear interpolation between pixel centres; NumPy, so that loading needs no device."""
    n = images.shape[-1]
    at = np.clip((np.arange(to) + 0.5) * n / to - 0.5, 0, n - 1)
    low = np.minimum(at.astype(int), n - 2)
    weights = np.zeros((to, n))
    weights[np.arange(to), low] = 1 - (at - low)
    weights[np.arange(to), low + 1] = at - low
    return (weights @ images @ weights.T).astype(np.float32)
