import gzip
import re
import struct

import numpy as np
import pytest

from jaxgrad import data

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (6, 28, 28), np.uint8),
    "t10k": RNG.integers(0, 256, (3, 28, 28), np.uint8),
}
LABELS = {"train": np.array([0, 1, 2, 3, 4, 5], np.uint8), "t10k": np.array([5, 0, 1], np.uint8)}


def idx(array, code=8):
    big = array.astype(array.dtype.newbyteorder(">"))
    return (
        bytes([0, 0, code, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + big.tobytes()
    )


def write_mnist(path, pack=lambda raw: raw, end="", sep="-"):
    for split in ("train", "t10k"):
        (path / f"{split}-images{sep}idx3-ubyte{end}").write_bytes(pack(idx(IMAGES[split])))
        (path / f"{split}-labels{sep}idx1-ubyte{end}").write_bytes(pack(idx(LABELS[split])))


def check(splits):
    for split, name in (("train", "train"), ("test", "t10k")):
        got = getattr(splits, split)
        assert got["image"].dtype == np.float32 and got["label"].dtype == np.int32
        np.testing.assert_array_equal(got["image"], IMAGES[name].astype(np.float32) / 255)
        np.testing.assert_array_equal(got["label"], LABELS[name])


@pytest.mark.parametrize("sep", ["-", "."])
def test_mnist_from_idx(tmp_path, sep):
    write_mnist(tmp_path, sep=sep)
    check(data.mnist(tmp_path))


def test_mnist_from_gzipped_idx(tmp_path):
    write_mnist(tmp_path, gzip.compress, ".gz")
    check(data.mnist(str(tmp_path)))


def test_mnist_from_npz(tmp_path):
    file = tmp_path / "mnist.npz"
    np.savez(
        file,
        x_train=IMAGES["train"],
        y_train=LABELS["train"],
        x_test=IMAGES["t10k"],
        y_test=LABELS["t10k"],
    )
    check(data.mnist(file))
    check(data.mnist(tmp_path))


def test_mnist_keeps_the_classes_asked_for(tmp_path):
    write_mnist(tmp_path)
    train, test = data.mnist(tmp_path, classes=(0, 5))
    assert train["label"].tolist() == [0, 5] and test["label"].tolist() == [5, 0]
    np.testing.assert_array_equal(train["image"][1], IMAGES["train"][5].astype(np.float32) / 255)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 8), ("i1", 9), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)],
)
def test_idx_of_every_type(tmp_path, dtype, code):
    array = np.arange(6).reshape(1, 2, 3).astype(dtype)
    (tmp_path / "a").write_bytes(idx(array, code))
    read = data.read_idx(tmp_path / "a")
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "is not an IDX file: it starts with nothing, and an IDX file with 00 00, a type"),
        (b"\x89PNG....", "is not an IDX file: it starts with 89 50 4e 47"),
        (b"\0\0\x07\x01\0\0\0\0", "is not an IDX file: it starts with 00 00 07 01"),
        (b"\0\0\x08\x03\0\0\0\x01", "is too short: 8 bytes can't hold its 3 sizes."),
        (
            idx(IMAGES["t10k"])[:-7],
            "is too short: 2,361 bytes; [3, 28, 28] of uint8 and the header take 2,368.",
        ),
        (idx(LABELS["t10k"]) + b"!", "is too long: 12 bytes; [3] of uint8"),
        (gzip.compress(idx(LABELS["t10k"]), mtime=0)[:-9], "can't be read: "),
        (b"\0\0\x08\x02" + b"\xff" * 8, "is too short: 12 bytes; [4294967295, 4294967295]"),
    ],
    ids=["empty", "png", "type", "sizes", "short", "long", "gzip", "huge"],
)
def test_broken_idx_files(tmp_path, raw, text):
    (tmp_path / "broken").write_bytes(raw)
    with pytest.raises(data.DataError, match=re.escape(text)) as info:
        data.read_idx(tmp_path / "broken")
    assert str(info.value).startswith(f"'{tmp_path / 'broken'}'")


def test_numbers_of_images_and_labels_differ(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS["t10k"]))
    with pytest.raises(
        data.DataError, match=r"train images are \[6, 28, 28\] and the labels \[3\]"
    ):
        data.mnist(tmp_path)


def test_missing_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-labels-idx1-ubyte \(with .gz or"):
        data.mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data at '.*nowhere': there is no such"):
        data.mnist(tmp_path / "nowhere")
    write_mnist(tmp_path)
    with pytest.raises(data.DataError, match=r"no train row has a label in \[11\]"):
        data.mnist(tmp_path, classes=[11])


def test_broken_npz_files(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, x_train=IMAGES["train"], y_train=LABELS["train"])
    with pytest.raises(data.DataError, match="has no x_test, y_test; it has x_train, y_train"):
        data.mnist(file)
    for raw in (b"", b"nothing of the kind", file.read_bytes()[:200]):
        file.write_bytes(raw)
        with pytest.raises(data.DataError, match=r"is not an .npz file, or is damaged"):
            data.mnist(file)


def test_a_damaged_compressed_stream(tmp_path):
    packed = bytearray(gzip.compress(idx(IMAGES["train"]), mtime=0))
    packed[40:48] = bytes(x ^ 0xFF for x in packed[40:48])
    (tmp_path / "a.gz").write_bytes(packed)
    with pytest.raises(data.DataError, match="can't be read"):
        data.read_idx(tmp_path / "a.gz")


def test_a_hostile_npz_is_not_run(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, **{f"{a}_{b}": np.array([print]) for a in "xy" for b in ("train", "test")})
    with pytest.raises(data.DataError, match="it is not a NumPy file of numbers"):
        data.mnist(file)


def test_digits():
    train, test = data.digits()
    assert len(train["label"]) + len(test["label"]) == 1797
    for split in (train, test):
        assert split["image"].shape[1:] == (28, 28)
        assert split["image"].dtype == np.float32 and split["label"].dtype == np.int32
        assert split["image"].min() >= 0 and split["image"].max() <= 1
        assert sorted(set(split["label"].tolist())) == list(range(10))
    with pytest.raises(data.DataError, match=r"classes=\[12\] leaves no digit"):
        data.digits([12])


def test_resizing_keeps_the_picture():
    small = np.zeros((1, 8, 8))
    small[0, 2, 5] = 1
    large = data._resize(small)[0]
    row, column = np.unravel_index(large.argmax(), large.shape)
    assert (row // 3.5, column // 3.5) == (2, 5)
    np.testing.assert_allclose(data._resize(np.ones((1, 8, 8))), 1, rtol=1e-6)
    # The weights of a pixel sum to its area, away from the border.
    np.testing.assert_allclose(large.sum(), 3.5**2, rtol=1e-6)


def test_noise():
    a, b = data.noise(8), data.noise(8, seed=1)
    assert a["image"].shape == (8, 28, 28) and a["target"].shape == (8, 10)
    assert (a["image"] != b["image"]).any()
    np.testing.assert_array_equal(a["image"], data.noise(8)["image"])
