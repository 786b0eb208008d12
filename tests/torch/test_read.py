import hashlib
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad.torch as jgt

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "torch_files"
EXPECTED = json.loads((GOLDENS / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_every_golden_has_pytorchs_names_dtypes_shapes_and_bits(name):
    checkpoint = jgt.read(GOLDENS / name)
    expected = EXPECTED[name]
    if checkpoint.format == "safetensors":  # its writer sorts by dtype
        assert sorted(checkpoint.tensors) == sorted(expected)
    else:
        assert list(checkpoint.tensors) == list(expected)
    for tensor_name, array in checkpoint.tensors.items():
        described = expected[tensor_name]
        assert (str(array.dtype), list(array.shape)) == (described["dtype"], described["shape"])
        assert array.tobytes().hex() == described["bytes"], tensor_name
        assert not array.flags.writeable


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dtypes_zip.pt", "zip"),
        ("dtypes_legacy.pt", "legacy"),
        ("dtypes.safetensors", "safetensors"),
        ("model.safetensors.index.json", "sharded"),
        ("pytorch_model.bin.index.json", "sharded"),
    ],
)
def test_the_content_decides_the_format(goldens, tmp_path, name, kind):
    assert jgt.read(goldens / name).format == kind
    if kind != "sharded":
        renamed = tmp_path / "anything.bin"
        renamed.write_bytes((goldens / name).read_bytes())
        assert jgt.read(str(renamed)).format == kind


@pytest.mark.parametrize("name", ["dtypes_zip.pt", "dtypes_legacy.pt", "views_legacy.pt"])
def test_arrays_enter_jax(goldens, name):
    # Legacy storages lie at odd addresses.
    for tensor_name, array in jgt.read(goldens / name).tensors.items():
        if array.dtype.itemsize < 8 and array.dtype.name != "complex32":
            np.testing.assert_array_equal(np.asarray(jnp.asarray(array)), array, tensor_name)


@pytest.mark.parametrize("suffix", ["zip", "legacy"])
def test_views_share_the_file_and_are_not_copied(goldens, suffix):
    tensors = jgt.read(goldens / f"views_{suffix}.pt").tensors
    for name in ("transposed", "row", "step", "offset", "diagonal", "empty_slice"):
        assert np.shares_memory(tensors[name], tensors["base"]) or not tensors[name].size
    assert tensors["expanded"].strides == (4, 0)


def test_tied_names_are_those_with_the_same_memory(goldens):
    for name in ("tied_zip.pt", "tied_legacy.pt", "protocol_4.pt"):
        checkpoint = jgt.read(goldens / name)
        assert checkpoint.tied == (("embed.weight", "head.weight"),)
        assert np.shares_memory(checkpoint.tensors["embed.weight"], checkpoint.tensors["part"])


@pytest.mark.parametrize("suffix", ["zip", "legacy"])
def test_a_training_checkpoint(goldens, suffix):
    checkpoint = jgt.read(goldens / f"training_{suffix}.pt")
    values = checkpoint.values
    assert (values["epoch"], values["loss.1"], values["best"]) == (3, 0.25, None)
    assert (values["name"], values["big"]) == ("größe", 2**70)
    assert values["optimizer.param_groups.0.lr"] == 0.5
    assert values["optimizer.param_groups.1.momentum"] == 0.9
    assert values["scheduler.step_size"] == 2
    assert (values["args.lr"], values["args.layers.1"]) == (0.1, 2)
    assert (values["shape.1"], values["counts.a"]) == (3, 1)
    assert checkpoint.opaque == {
        "classes": "set",
        "dtype": "torch.float32",
        "device": "torch.device",
        "numpy": "numpy._core.multiarray._reconstruct",
        "function": "torch.nn.functional.relu",
        "raw": "_codecs.encode",
    }
    assert checkpoint.module is None


def test_sub_gives_one_part(goldens):
    checkpoint = jgt.read(goldens / "training_zip.pt")
    model = checkpoint.sub("model")
    assert list(model.tensors) == ["0.weight", "0.bias"] + [
        f"1.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert model.tensors["0.weight"] is checkpoint.tensors["model.0.weight"]
    assert list(checkpoint.sub("optimizer.state.0").tensors) == ["momentum_buffer"]
    assert checkpoint.sub("epoch").values == {"": 3}
    with pytest.raises(KeyError, match=r"under 'modle'; prefixes: \['model'"):
        checkpoint.sub("modle")


def test_sub_keeps_ties(write_zip, body):
    weight = body.tensor(body.storage("0", 2), 0, (2,), (1,))
    state = b"}(" + body.text("a") + weight + b"q\0" + body.text("b") + b"h\0u"
    checkpoint = jgt.read(write_zip(b"}" + body.text("net") + state + b"s", {"0": b"\0" * 8}))
    assert checkpoint.tied == (("net.a", "net.b"),)
    assert checkpoint.sub("net").tied == (("a", "b"),)


def test_repr_is_a_table(goldens):
    path = goldens / "tied_zip.pt"
    assert repr(jgt.read(path)) == (
        f"{path} (zip): 7 tensors, 100 bytes\n"
        "  embed.weight        (3, 2)  float32  24\n"
        "  head.weight         (3, 2)  float32  24\n"
        "  part                (2, 2)  float32  16\n"
        "  equal_but_separate  (3, 2)  float32  24\n"
        "  head.bias           (3,)    float32  12\n"
        "  nothing             (0,)    float32  0\n"
        "  nothing_else        (0,)    float32  0\n"
        "  tied: embed.weight = head.weight"
    )
    shown = repr(jgt.read(goldens / "training_zip.pt"))
    assert "  and 44 values\n" in shown
    assert "  not read: numpy (numpy._core.multiarray._reconstruct)" in shown


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        ("sparse_coo", "layer.weight", "is a sparse tensor; save it dense"),
        ("sparse_csr", "layer.weight", "is a sparse tensor; save it dense"),
        ("quantised", "layer.weight", "is a quantised tensor; save it dequantised"),
        ("nested", "layer.weight", "is a nested tensor; save its parts"),
        ("meta", "layer.weight", "is a meta tensor, which has no values"),
        ("packed_float4", "layer.weight", "has the dtype torch.float4_e2m1fn_x2; readable are"),
        ("torchscript", "", "a TorchScript archive (torch.jit.save) holds a program"),
    ],
)
def test_what_has_no_dense_array_is_refused_by_name(goldens, name, entry, reason):
    path = goldens / f"refused_{name}.pt"
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(path)
    assert (caught.value.path, caught.value.entry) == (str(path), entry)
    assert caught.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "a tar file of PyTorch 0.1.9 or older"),
        (pickle.dumps([1]), "a pickle, but not one of torch.save"),
        (b"\x89HDF\r\n\x1a\n", "neither a torch.save file nor safetensors: it starts with"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    path = tmp_path / "net.pt"
    path.write_bytes(content)
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(path)
    assert str(caught.value).startswith(f"{path}: {reason}")


def test_what_open_raises_is_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        jgt.read(tmp_path / "absent.pt")
    with pytest.raises(IsADirectoryError):
        jgt.read(tmp_path)


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(jgt.TorchFileError, match="not a regular file"):
        jgt.read(tmp_path / "pipe")


def test_checksums(write_zip, write_legacy, body, goldens):
    large = bytes(range(256)) * 256
    made = body.tensor(body.storage("0", 1 << 14), 0, (1 << 14,), (1,))
    path = write_zip(made, {"0": large})
    assert jgt.read(path, checksums=True).tensors[""].tobytes() == large
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(large) + 5000] ^= 4
    path.write_bytes(damaged)
    jgt.read(path)  # mapped, not read
    with pytest.raises(jgt.TorchFileError, match=r"made/data/0: is damaged: its checksum is"):
        jgt.read(path, checksums=True)

    for name in ("tied_legacy.pt", "dtypes.safetensors"):
        with pytest.raises(jgt.TorchFileError, match="only zip files carry checksums"):
            jgt.read(goldens / name, checksums=True)
    with pytest.raises(jgt.TorchFileError, match="saved without checksums"):
        jgt.read(goldens / "without_checksums.pt", checksums=True)
    shards = jgt.read(goldens / "pytorch_model.bin.index.json", checksums=True)
    assert len(shards.tensors) == 3


def test_any_bit_flip_in_a_small_file_is_seen_or_harmless(goldens, tmp_path):
    """With checksums, what can still be read is what was written."""
    path = tmp_path / "flipped.pt"
    original = (goldens / "sequential_zip.pt").read_bytes()
    expected = EXPECTED["sequential_zip.pt"]
    refused = 0
    for at in range(len(original)):
        flipped = bytearray(original)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            checkpoint = jgt.read(path, checksums=True)
        except jgt.TorchFileError:
            refused += 1
            continue
        found = {name: array.tobytes().hex() for name, array in checkpoint.tensors.items()}
        assert found == {name: fields["bytes"] for name, fields in expected.items()}, at
    assert refused > len(original) // 3  # the rest is padding, dates and unread entries


@pytest.mark.parametrize(
    "name", ["sequential_zip.pt", "sequential_legacy.pt", "model-00001-of-00002.safetensors"]
)
def test_every_truncation_is_refused(goldens, tmp_path, name):
    path = tmp_path / "cut.pt"
    original = (goldens / name).read_bytes()
    for length in range(len(original)):
        path.write_bytes(original[:length])
        with pytest.raises(jgt.TorchFileError):
            jgt.read(path)


def sparse_zip(path: pathlib.Path, pickled: bytes, size: int) -> None:
    """A zip whose storage is a hole: it takes no space on the disk."""
    with open(path, "wb") as file:
        directory = []
        for name, content in ((b"m/data.pkl", pickled), (b"m/data/0", None)):
            length = size if content is None else len(content)
            crc = 1 if content is None else zlib.crc32(content)
            fields = (0, 0, 0, 0, crc, length, length, len(name), 0)
            directory.append((name, fields, file.tell()))
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, *fields) + name)
            file.write(content or b"")
            if content is None:
                file.seek(length, os.SEEK_CUR)
        start = file.tell()
        for name, fields, at in directory:
            extra = struct.pack("<3H2L", 0, 0, 0, 0, at)
            file.write(struct.pack("<4s6H3L2H", b"PK\1\2", 20, 20, *fields) + extra + name)
        end = file.tell() - start
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, end, start, 0))


READ_AND_MEASURE = """
import resource, sys
import jaxgrad.torch as jgt
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
array = next(iter(jgt.read(sys.argv[1]).tensors.values()))
assert array.shape == (2, 1 << 28), array.shape
assert float(array[1, -1]) == 0.0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_of_two_gigabytes_costs_no_memory(tmp_path, write_legacy, body, kind):
    count = 1 << 29
    made = body.tensor(
        body.storage("0", count, legacy=kind == "legacy"), 0, (2, count // 2), (count // 2, 1)
    )
    path = tmp_path / "made.pt"
    if kind == "zip":
        sparse_zip(path, b"\x80\x02" + made + b".", 4 * count)
    elif kind == "legacy":
        path = write_legacy(made, {"0": (count, b"")})
        os.truncate(path, path.stat().st_size + 4 * count)
    else:
        fields = {"dtype": "F32", "shape": [2, count // 2], "data_offsets": [0, 4 * count]}
        header = json.dumps({"a": fields}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(path, path.stat().st_size + 4 * count)
    command = [sys.executable, "-c", READ_AND_MEASURE, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 16 * 1024  # KiB


WITHOUT_TORCH = """
import pathlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise AssertionError(f"imported {name}")

sys.meta_path.insert(0, Refuse())
import jaxgrad
import jaxgrad.torch as jgt
read = 0
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    if path.suffix in (".pt", ".bin", ".safetensors") or path.name.endswith(".index.json"):
        try:
            repr(jgt.read(path))
        except jgt.TorchFileError:
            assert path.name.startswith("refused_"), path
        read += 1
assert "torch" not in sys.modules
print(read)
"""


def test_torch_is_never_imported(goldens):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(goldens)]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == len(EXPECTED) + 7 + 4  # the refused ones, and the shards


def test_reading_changes_nothing(goldens):
    path = goldens / "module_zip.pt"
    before = hashlib.sha256(path.read_bytes()).digest()
    first, second = jgt.read(path), jgt.read(path)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    assert first.module == second.module
    with pytest.raises(TypeError):
        first.tensors["new"] = np.zeros(1)  # pyright: ignore[reportIndexIssue]


@pytest.mark.torch
def test_fresh_files_of_a_live_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 3, 3),
        torch.nn.GRU(3, 4, num_layers=2),
        torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        torch.nn.GroupNorm(2, 4),
        torch.nn.ConvTranspose2d(2, 3, 2),
    )
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    path = tmp_path / "net.pt"
    for options in ({}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}):
        torch.save({"net": model, "state": model.state_dict()}, path, **options)
        checkpoint = jgt.read(path)
        module, state = checkpoint.sub("net"), checkpoint.sub("state")
        for part in (module, state):
            assert list(part.tensors) == list(expected)
            for name, array in part.tensors.items():
                np.testing.assert_array_equal(array, expected[name])
        assert module.module is not None and state.module is None
        assert module.module.children["0"].config["kernel_size"] == (3,)


def test_a_repacked_zip_is_read(goldens, tmp_path):
    """Other tools name the folder differently, use zip64 fields and add a comment."""
    path = tmp_path / "repacked.pt"
    with zipfile.ZipFile(goldens / "tied_zip.pt") as source, zipfile.ZipFile(path, "w") as target:
        target.comment = b"repacked"
        for name in reversed(source.namelist()):
            renamed = name.replace("tied_zip/", "other/")
            with target.open(renamed, "w", force_zip64=True) as entry:
                entry.write(source.read(name))
    original, repacked = jgt.read(goldens / "tied_zip.pt"), jgt.read(path, checksums=True)
    assert repacked.tied == original.tied
    for name, array in original.tensors.items():
        np.testing.assert_array_equal(repacked.tensors[name], array)
