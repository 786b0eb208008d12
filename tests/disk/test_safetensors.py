import io
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgrad._disk.malformed import MalformedError
from jaxgrad._disk.mapped import mapped
from jaxgrad._disk.safetensors import DTYPES, read_header, write


def written(path, arrays, metadata=()):
    with path.open("wb") as file:
        write(file, arrays, dict(metadata))
    return mapped(path)


def raw(path, header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return mapped(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_to_the_bit(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    data = written(tmp_path / "file", {"a/b": array, "empty": array[:0]}, {"step": "7"})
    entries, metadata = read_header(data)
    assert metadata == {"step": "7"} and list(entries) == ["a/b", "empty"]
    found = entries["a/b"].array(data)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes() and not found.flags.writeable
    assert entries["empty"].array(data).shape == (0, 3)


def test_the_library_of_the_format_reads_the_same(tmp_path):
    arrays = {"w": np.linspace(0, 1, 5, dtype="float32"), "i": np.arange(3)}
    written(tmp_path / "file", arrays)
    for name, found in load_file(tmp_path / "file").items():
        np.testing.assert_array_equal(found, arrays[name])


def test_arrays_in_another_byte_order_or_layout(tmp_path):
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    data = written(tmp_path / "file", {"x": array})
    np.testing.assert_array_equal(read_header(data)[0]["x"].array(data), array)


X = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "entry", "reason"),
    [
        (b"[]", b"", "header", "its JSON is a list, expected an object"),
        (b"{", b"", "header", "not JSON"),
        (b'{"x": 1, "x": 2}', b"", "x", "the JSON names this twice"),
        ({"x": {}}, b"", "x", "expected exactly dtype, shape and data_offsets"),
        ({"x": {**X, "dtype": "F4"}}, bytes(4), "x", "dtype F4 is not readable; readable: F64"),
        ({"x": {**X, "shape": [2]}}, bytes(4), "x", "which takes 8"),
        ({"x": {**X, "shape": [-1]}}, bytes(4), "x", "dimension is -1, expected an integer"),
        ({"x": {**X, "shape": [1] * 65}}, bytes(4), "x", "a shape of 65 dimensions, at most 64"),
        ({"x": {**X, "shape": [0, 2**62], "data_offsets": [0, 0]}}, b"", "x", "size is"),
        ({"x": X, "y": X}, bytes(4), "y", "overlaps another tensor"),
        ({"x": X}, bytes(5), "", "1 bytes after the last tensor"),
        ({"__metadata__": 1}, b"", "__metadata__", "is a int, expected an object"),
    ],
)
def test_a_file_that_breaks_a_rule(header, data, entry, reason, tmp_path):
    with pytest.raises(MalformedError) as info:
        read_header(raw(tmp_path / "file", header, data))
    assert (info.value.entry, reason in info.value.reason) == (entry, True), info.value.reason


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(MalformedError, match="the file is empty"):
        mapped(tmp_path / "empty")
    with pytest.raises(MalformedError, match="not a regular file"):
        mapped("/dev/null")
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "none")
    (tmp_path / "short").write_bytes(b"\xff" * 9)
    with pytest.raises(MalformedError, match=r"a header of \d+ bytes in a file of 9"):
        read_header(mapped(tmp_path / "short"))


def test_nothing_is_kept_of_what_is_written():
    array = np.ones(3, "float32")
    file = io.BytesIO()
    write(file, {"x": array}, {})
    array[:] = 2
    assert file.getvalue().endswith(np.ones(3, "float32").tobytes())
