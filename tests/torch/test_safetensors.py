import json
import struct

import numpy as np
import pytest
import safetensors.numpy

import jaxgrad.torch as jgt


def write(path, header, data: bytes = b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def f32(start: int, stop: int, shape: list) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def refusal(path) -> jgt.TorchFileError:
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(path)
    return caught.value


def test_what_the_safetensors_package_writes(tmp_path):
    tensors = {
        "matrix": np.arange(6.0).reshape(2, 3),
        "scalar": np.array(7, np.uint16),
        "empty": np.zeros((0, 4), np.float16),
    }
    safetensors.numpy.save_file(tensors, tmp_path / "a", metadata={"made": "here"})
    checkpoint = jgt.read(tmp_path / "a")
    assert checkpoint.values == {"made": "here"}
    assert checkpoint.tied == ()
    assert sorted(checkpoint.tensors) == sorted(tensors)
    for name, array in checkpoint.tensors.items():
        assert array.dtype == tensors[name].dtype
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize(
    ("header", "data", "entry", "reason"),
    [
        (b'{"a":', b"", "header", "not JSON: Expecting value"),
        (b'{"a":\xff}', b"", "header", "not JSON: 'utf-8' codec can't decode byte"),
        (b'{"a":1,"a":2}', b"", "a", "the JSON names this twice"),
        (b'{"a":' + b"[" * 100_000, b"", "header", "its JSON is nested too deeply"),
        ({"__metadata__": 1}, b"", "__metadata__", "is a int, expected an object"),
        ({"a": 1}, b"", "a", "expected exactly dtype, shape and data_offsets"),
        ({"a": {**f32(0, 4, [1]), "more": 1}}, b"", "a", "expected exactly dtype, shape"),
        ({"a": {**f32(0, 4, [1]), "dtype": "F4"}}, b"", "a", "dtype F4 is not readable; readable"),
        ({"a": {**f32(0, 4, [1]), "dtype": [1]}}, b"", "a", "dtype [1] is not readable"),
        ({"a": {**f32(0, 4, [1]), "shape": 1}}, b"", "a", "shape and data_offsets must be lists"),
        ({"a": f32(0, 4, [1.0])}, b"1234", "a", "dimension is a float, expected an integer"),
        ({"a": f32(-4, 0, [1])}, b"1234", "a", "data offset is -4, expected an integer"),
        ({"a": f32(0, 4, [2])}, b"1234", "a", "bytes 0 to 4 of 4 for shape (2,) of float32, which"),
        ({"a": f32(0, 8, [2])}, b"1234", "a", "bytes 0 to 8 of 4 for shape (2,) of float32, which"),
        ({"a": f32(8, 4, [])}, b"1234", "a", "bytes 8 to 4 of 4 for shape () of float32"),
        ({"a": f32(0, 0, [0, 2**62, 2**62])}, b"", "a", "expected an integer in [0, 2**63)"),
        ({"a": f32(0, 0, [0] * 65)}, b"", "a", "a shape of 65 dimensions, at most 64"),
        ({"a": f32(0, 4, [2] * 10**6)}, b"1234", "a", "a shape of 1000000 dimensions"),
        ({"a": f32(0, 8, [2]), "b": f32(4, 8, [1])}, b"8" * 8, "b", "overlaps another tensor"),
        ({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, b"1" * 12, "b", "leaves a hole before it"),
        ({"a": f32(0, 4, [1])}, b"1" * 6, "", "2 bytes after the last tensor"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, entry, reason):
    error = refusal(write(tmp_path / "a.safetensors", header, data))
    assert error.entry == entry
    assert reason in error.reason


def test_a_header_longer_than_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    assert str(refusal(path)) == f"{path}: header: a header of {2**63} bytes in a file of 10"


def index(tmp_path, content) -> jgt.TorchFileError:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return refusal(path)


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/b", "..", ".", "", "c:a", "a\\b", "a\0"]
)
def test_shards_lie_beside_the_index(tmp_path, name):
    error = index(tmp_path, {"weight_map": {"w": name}})
    assert (error.entry, error.reason) == ("w", "its file is not a plain file name")


@pytest.mark.parametrize(
    ("content", "entry", "reason"),
    [
        ("[]", "", "its JSON is a list, expected an object"),
        ({}, "", "has no object `weight_map` from weights to files"),
        ({"weight_map": {"w": 1}}, "w", "its file is not a plain file name"),
        ({"weight_map": {"w": "a.json"}}, "w", "its file is itself an index"),
        (
            {"weight_map": {"w": "no"}},
            "no",
            "the index lists this file, but it is missing from the folder",
        ),
        ({"weight_map": {"w": "x" * 5000}}, "x" * 77 + "...", "the index lists this file"),
    ],
)
def test_indexes_that_lie(tmp_path, content, entry, reason):
    error = index(tmp_path, content)
    assert error.entry == entry
    assert error.reason.startswith(reason)


def test_a_weight_that_is_not_in_its_shard(tmp_path):
    shard = tmp_path / "one.safetensors"
    safetensors.numpy.save_file({"a": np.ones(1)}, shard)
    error = index(tmp_path, {"weight_map": {"a": shard.name, "b": shard.name}})
    assert (error.path, error.entry) == (str(shard), "b")
    assert error.reason == "is missing, but model.safetensors.index.json lists it here"


def test_a_broken_shard_is_named(tmp_path):
    (tmp_path / "one.bin").write_bytes(b"nonsense")
    assert index(tmp_path, {"weight_map": {"a": "one.bin"}}).path == str(tmp_path / "one.bin")


def test_an_index_keeps_its_order_and_the_ties_inside_shards(goldens, tmp_path):
    for name in ("tied_zip.pt", "list.pt"):
        (tmp_path / name).write_bytes((goldens / name).read_bytes())
    names = {"1": "list.pt", "head.weight": "tied_zip.pt", "embed.weight": "tied_zip.pt"}
    path = tmp_path / "model.bin.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    checkpoint = jgt.read(path)
    assert list(checkpoint.tensors) == list(names)
    assert checkpoint.tied == (("embed.weight", "head.weight"),)
    assert checkpoint.tensors["1"].tolist() == [0.0, 0.0]
