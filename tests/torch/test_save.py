"""The way back: files that PyTorch opens, bit for bit, whole or not at all."""

import itertools
import json
import os
import struct
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxgrad.torch as jt

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex64",),
]
PT_ONLY = ["complex128", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
SUFFIXES = [".pt", ".safetensors"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def bits(name, n):
    """Every byte pattern of a dtype: quiet NaNs, subnormals, negative zeros."""
    dtype = dtype_of(name)
    raw = np.random.default_rng(0).integers(0, 256, n * dtype.itemsize, np.uint8)
    return raw.view(dtype) if name != "bool" else raw > 127


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(dtype, suffix, tmp_path):
    path = tmp_path / f"params{suffix}"
    params = {"fc": {"kernel": bits(dtype, 35).reshape(5, 7), "bias": bits(dtype, 7)}}
    jt.save_torch(params, path)
    filled = jt.load_into(jax.tree.map(np.zeros_like, params), path)
    assert jax.tree.all(jax.tree.map(same_bits, filled, params))
    kernel = jt.read(path).tensors["fc.weight"]
    assert same_bits(kernel, np.ascontiguousarray(params["fc"]["kernel"].T))


@pytest.mark.parametrize("dtype", PT_ONLY)
def test_dtypes_that_only_pytorch_has(dtype, tmp_path):
    params = {"gain": bits(dtype, 5)}
    jt.save_torch(params, tmp_path / "gain.pt")
    assert same_bits(jt.read(tmp_path / "gain.pt").tensors["gain"], params["gain"])


@pytest.mark.torch
@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [*itertools.product(DTYPES, SUFFIXES), *((dtype, ".pt") for dtype in PT_ONLY)],
)
def test_pytorch_reads_the_same_bits(dtype, suffix, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"params{suffix}"
    params = {
        "a": bits(dtype, 6).reshape(2, 3),
        "b": bits(dtype, 1).reshape(()),
        "c": bits(dtype, 0),
    }
    jt.save_torch(params, path, rules=[jt.Rule("a", layer="same")])
    if suffix == ".pt":
        loaded = torch.load(path, weights_only=True)
    else:
        loaded = pytest.importorskip("safetensors.torch").load_file(path)
    for name, x in params.items():
        assert str(loaded[name].dtype).removeprefix("torch.") == dtype
        assert tuple(loaded[name].shape) == x.shape
        raw = loaded[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        assert raw.tobytes() == x.tobytes()


@pytest.mark.torch
def test_pytorch_maps_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    jt.save_torch({"gain": bits("float32", 100)}, tmp_path / "gain.pt")
    mapped = torch.load(tmp_path / "gain.pt", mmap=True, weights_only=True)
    assert mapped["gain"].numpy().tobytes() == bits("float32", 100).tobytes()


@pytest.mark.torch
def test_a_pytorch_model_takes_the_state_dict(tmp_path):
    """Strictly: BatchNorm's counter is not missed."""
    torch = pytest.importorskip("torch")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
            self.bn = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.fc = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            x = self.bn(self.conv(x))
            return self.fc(x.reshape(x.shape[0], -1))

    model = Model(nnx.Rngs(0))
    path = tmp_path / "model.pt"
    jt.save_torch(model, path, rules=[jt.Rule("fc", flatten=4)])
    net = torch.nn.ModuleDict(
        {
            "conv": torch.nn.Conv2d(2, 4, 3),
            "bn": torch.nn.BatchNorm2d(4),
            "fc": torch.nn.Linear(16, 3),
        }
    ).eval()
    net.load_state_dict(torch.load(path, weights_only=True))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)
    with torch.no_grad():
        expected = net["bn"](net["conv"](torch.from_numpy(np.moveaxis(x, -1, 1).copy())))
        expected = net["fc"](expected.flatten(1)).numpy()
    jt.verify(model, None, jnp.asarray(x), expected, rtol=0.0)


def test_like_gives_names_and_layouts_of_the_file(tmp_path):
    """A fine-tuned model goes back under the names it came by; its new head gets its own."""
    source = {
        "net.0.weight": np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2),
        "net.3.weight": np.arange(60, dtype=np.float32).reshape(5, 12),
    }
    params = {
        "Conv_0": {"kernel": np.zeros((2, 2, 1, 3), np.float32)},
        "Dense_0": {"kernel": np.zeros((12, 5), np.float32)},
        "head": {"kernel": np.ones((5, 2), np.float32)},
    }
    rules = [jt.Rule("net.3", flatten=3)]
    report = jt.match(params, source, rules=rules, wrt="!head")
    jt.save_torch(report.apply(), tmp_path / "tuned.pt", like=report)
    back = jt.read(tmp_path / "tuned.pt").tensors
    assert list(back) == ["net.0.weight", "net.3.weight", "head.weight"]
    assert all(same_bits(back[name], x) for name, x in source.items())
    assert same_bits(back["head.weight"], np.ones((2, 5), np.float32))


def test_like_of_another_tree():
    report = jt.match({"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)})
    with pytest.raises(jt.MappingError) as caught:
        jt.to_torch({"a": np.zeros(3, np.float32)}, like=report)
    assert str(caught.value) == (
        "`like` is the report of another tree: it has 'a' float32[2], but the parameters have "
        "'a' float32[3]"
    )


def test_rules_rename_what_is_written():
    params = {"layers": {"0": {"kernel": np.zeros((2, 3))}}, "aux": np.zeros(2)}
    rules = [("layers.*", "net.*"), jt.Rule("aux", drop=True)]
    assert list(jt.to_torch(params, rules=rules)) == ["net.0.weight"]


def test_default_names_are_pytorchs():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.LSTMCell(2, 3, rngs=rngs))
            self.both = nnx.Bidirectional(
                *(nnx.RNN(nnx.SimpleCell(2, 3, rngs=rngs)) for _ in range(2))
            )
            self.cell = nnx.LSTMCell(2, 3, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(1, 2, rngs=rngs)
            self.bn = nnx.BatchNorm(2, rngs=rngs)

    assert set(jt.to_torch(Model(nnx.Rngs(0)))) == {
        *(f"rnn.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"both.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"both.{kind}_l0_reverse" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"cell.{kind}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        *(f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias")),
        *(f"attention.out_proj.{name}" for name in ("weight", "bias")),
        *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")),
    }


def test_a_summed_bias_comes_back_bit_for_bit():
    """Negative zero is what adds nothing: 0.0 would turn -0.0 into 0.0."""
    cell = nnx.LSTMCell(2, 2, rngs=nnx.Rngs(0))
    cell.hi.bias[...] = jnp.array([-0.0, 0.0])
    filled = jt.load_into(cell, jt.to_torch(cell))
    assert same_bits(filled.hi.bias[...], np.array([-0.0, 0.0], np.float32))


def test_a_convolution_that_may_be_transposed_is_not_written():
    with pytest.raises(jt.MappingError) as caught:
        jt.to_torch({"up": {"kernel": np.zeros((3, 3, 2, 4))}})
    assert str(caught.value).startswith(
        "the parameters can't be written for PyTorch: 1 problem\nlayout:\n  'up/kernel' "
        "[3, 3, 2, 4] and 'up.weight': the layer type is ambiguous; declare it with Rule('up', "
    )


@pytest.mark.parametrize(
    ("name", "params", "text"),
    [
        ("a.npz", {"a": np.zeros(2)}, "'a.npz' must end in one of .pt, .pth, .bin, .safetensors"),
        (
            "a.safetensors",
            {"a": np.zeros(2, np.complex128)},
            "'a' complex128[2]: a safetensors file cannot hold complex128",
        ),
        ("a.pt", {"a": np.zeros(2, "datetime64[s]")}, "a pt file cannot hold datetime64[s]"),
    ],
)
def test_what_can_not_be_written(name, params, text, tmp_path):
    with pytest.raises(jt.MappingError) as caught:
        jt.save_torch(params, tmp_path / name)
    assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


# The files themselves.


def test_storages_are_aligned_as_pytorch_aligns_them(tmp_path):
    jt.save_torch({f"x{i}": bits("float32", 3 + i) for i in range(5)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        stored = [info for info in archive.infolist() if "/data/" in info.filename]
        assert len(stored) == 5
        for info in stored:
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            assert start % 64 == 0 and info.compress_type == zipfile.ZIP_STORED
            assert data[start : start + info.file_size] == archive.read(info)


def test_equal_parameters_make_equal_files(tmp_path):
    for name in ("a.pt", "b.pt"):
        jt.save_torch({"x": bits("float32", 3)}, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_the_header_of_safetensors(tmp_path):
    jt.save_torch({"x": bits("bfloat16", 3)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    size = struct.unpack_from("<Q", data)[0]
    assert size % 8 == 0
    assert json.loads(data[8 : 8 + size]) == {
        "__metadata__": {"format": "pt"},
        "x": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]},
    }


def test_big_endian_arrays_are_written_little_endian(tmp_path):
    jt.save_torch({"x": np.array([1.0, 2.0], ">f4")}, tmp_path / "x.pt")
    assert jt.read(tmp_path / "x.pt").tensors["x"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    jt.save_torch({"x": np.zeros(2, np.float32)}, path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        jt.save_torch({"x": np.ones(2, np.float32)}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_large_members_get_zip64_headers_and_stay_aligned(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 64)
    jt.save_torch({"x": bits("float32", 100)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    assert data.index(bits("float32", 100).tobytes()) % 64 == 0
    assert same_bits(jt.read(tmp_path / "x.pt").tensors["x"], bits("float32", 100))
