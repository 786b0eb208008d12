"""Writes the files that the reader's tests open, and what PyTorch finds in them.

Run from this folder: `python make_torch_files.py` (torch==2.13.0, safetensors). The contents are
deterministic; the containers hold an id of PyTorch's own, so bytes differ from run to run.
"""

import argparse
import collections
import io
import json
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np
import safetensors.torch
import torch
import torch._sources

HERE = pathlib.Path(__file__).parent
DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
EXPECTED: dict[str, dict] = {}


class Block(torch.nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.norm = torch.nn.BatchNorm2d(channels, eps=1e-3)
        self.act = torch.nn.ReLU()
        self.downsample = None


class Net(torch.nn.Module):
    """Every kind of state a module can have: shared, absent, unsaved and nested."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3, stride=2)
        self.blocks = torch.nn.ModuleList([Block(4), Block(4)])
        self.norm = torch.nn.LayerNorm(4, elementwise_affine=False)
        self.embed = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.stem
        self.mix = torch.nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.attend = torch.nn.MultiheadAttention(4, 2)
        self.encoder = torch.nn.TransformerEncoderLayer(4, 2, 8)
        self.scales = torch.nn.ParameterList([torch.ones(2), torch.zeros(1)])
        self.drop = torch.nn.Dropout(0.25)
        self.register_buffer("mean", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)
        self.register_buffer("nothing", None)
        self.register_parameter("absent", None)
        self.plain = torch.ones(2)
        self.widths = [4, 4]
        self.transform = torch.nn.functional.gelu


def everything(dtype: str) -> torch.Tensor:
    """Finite values of a dtype, both signs and zero where it has them."""
    torch_dtype = getattr(torch, dtype)
    if dtype == "float8_e8m0fnu":
        return torch.tensor([0.5, 1.0, 2.0, 64.0]).to(torch_dtype)
    if dtype.startswith(("uint", "int")):
        info = torch.iinfo(torch_dtype)
        return torch.tensor([0, 1, info.min, info.max], dtype=torch_dtype)
    values = torch.tensor([[0.0, 1.0, -0.5], [1.5, -2.0, 96.0]], dtype=torch.complex128)
    if dtype.startswith("complex"):
        values = values + 0.25j
        if dtype == "complex32":
            return torch.view_as_complex(torch.view_as_real(values).to(torch.float16))
        return values.to(torch_dtype)
    real = values.real.contiguous()
    return real.to(torch_dtype) if dtype != "bool" else real > 0


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    numbers = torch.tensor([1 + 2j, 3 - 4j, -5 + 6j], dtype=torch.complex64)
    return {
        "base": base,
        "transposed": base.permute(2, 0, 1),
        "row": base[1, 2],
        "step": base[:, ::2, 1::2],
        "offset": base.reshape(-1)[5:],
        "diagonal": base[0].diagonal(),
        "expanded": torch.tensor([7.0, 8.0])[:, None].expand(2, 5),
        "overlapping": torch.arange(6.0).unfold(0, 3, 1),
        "conj": numbers.conj(),
        "conj_step": numbers.conj()[::2],
        "imaginary_of_conj": numbers.clone().conj().imag,
        "negative_conj": torch._neg_view(numbers.conj()),  # pyright: ignore[reportPrivateImportUsage]
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "empty_slice": base[2:],
        "channels_last": torch.arange(16.0)
        .reshape(1, 2, 2, 4)
        .to(memory_format=torch.channels_last),
    }


def tied() -> dict[str, torch.Tensor]:
    weight = torch.arange(6.0).reshape(3, 2)
    return {
        "embed.weight": weight,
        "head.weight": weight,
        "part": weight[:2],
        "equal_but_separate": weight.clone(),
        "head.bias": torch.zeros(3),
        "nothing": torch.zeros(0),
        "nothing_else": torch.zeros(0),
    }


def training() -> dict:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}],
        lr=0.01,
        momentum=0.9,
    )
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict(),
        "epoch": 3,
        "loss": [0.5, 0.25],
        "best": None,
        "name": "größe",
        "big": 2**70,
        "args": argparse.Namespace(lr=0.1, layers=(1, 2)),
        "classes": {"cat", "dog"},
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "numpy": np.arange(3),
        "function": torch.nn.functional.relu,
        "shape": torch.Size([2, 3]),
        "counts": collections.defaultdict(int, a=1),
        "raw": b"bytes",
    }


def subclasses() -> dict[str, torch.Tensor]:
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.note = "trained"  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "parameter": torch.nn.Parameter(torch.arange(3.0), requires_grad=False),
        "attributed": attributed,
        "buffer": torch.nn.Buffer(torch.arange(2.0)),
    }


def describe(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict]:
    described = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        raw = plain.view(torch.uint8) if plain.ndim else plain.reshape(1).view(torch.uint8)
        described[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": raw.numpy().tobytes().hex() if plain.numel() else "",
        }
    return described


def save(name: str, content: object, tensors: Mapping[str, torch.Tensor], **options) -> None:
    torch.save(content, HERE / name, **options)
    EXPECTED[name] = describe(tensors)


def save_both(stem: str, content: object, tensors: Mapping[str, torch.Tensor]) -> None:
    save(f"{stem}_zip.pt", content, tensors)
    save(f"{stem}_legacy.pt", content, tensors, _use_new_zipfile_serialization=False)


def nested_tensors(training_state: dict) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": tensor for name, tensor in training_state["model"].items()}
    for index, state in training_state["optimizer"]["state"].items():
        found[f"optimizer.state.{index}.momentum_buffer"] = state["momentum_buffer"]
    return found


def readable() -> None:
    dtypes = {dtype: everything(dtype) for dtype in DTYPES}
    save_both("dtypes", dtypes, dtypes)
    save_both("views", views(), views())
    save_both("tied", tied_state := tied(), tied_state)
    net = Net()
    for index, parameter in enumerate(net.parameters()):
        values = torch.arange(parameter.numel(), dtype=torch.float32) / 8 + index
        parameter.data = values.reshape(parameter.shape)
    net.mix.flatten_parameters()
    save_both("module", net, net.state_dict())
    small = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout(0.5))
    small[0].weight.data = torch.tensor([[1.0, -2.0]])
    small[0].bias.data = torch.tensor([0.5])
    save_both("sequential", small, small.state_dict())
    state = training()
    save_both("training", state, nested_tensors(state))
    save("state_dict.pt", net.state_dict(), net.state_dict())
    save("protocol_4.pt", tied_state, tied_state, pickle_protocol=4)
    save("protocol_5_module.pt", net, net.state_dict(), pickle_protocol=5)
    save("subclasses.pt", made := subclasses(), made)
    save("tensor.pt", torch.arange(3.0), {"": torch.arange(3.0)})
    save("list.pt", [torch.ones(1), torch.zeros(2)], {"0": torch.ones(1), "1": torch.zeros(2)})
    torch.serialization.set_crc32_options(False)
    save("without_checksums.pt", tied_state, tied_state)
    torch.serialization.set_crc32_options(True)


def safetensors_files() -> None:
    names = [name for name in DTYPES if name not in ("complex32", "complex128")]
    tensors = {name: everything(name) for name in names} | {"empty": torch.zeros(0, 2)}
    safetensors.torch.save_file(tensors, HERE / "dtypes.safetensors", metadata={"format": "pt"})
    EXPECTED["dtypes.safetensors"] = describe(tensors)
    parts = [{"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}, {"b.weight": torch.ones(1)}]
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        weight_map = {}
        for number, part in enumerate(parts, 1):
            shard = f"{stem}-{number:05}-of-00002.{suffix}"
            weight_map |= dict.fromkeys(part, shard)
            if suffix == "bin":
                torch.save(part, HERE / shard)
            else:
                safetensors.torch.save_file(part, HERE / shard)
        index = {"metadata": {"total_size": 28}, "weight_map": weight_map}
        name = f"{stem}.{suffix}.index.json"
        (HERE / name).write_text(json.dumps(index, indent=1) + "\n")
        EXPECTED[name] = describe(parts[0] | parts[1])


def refused() -> None:
    dense = torch.eye(2)
    for name, tensor in {
        "sparse_coo": dense.to_sparse(),
        "sparse_csr": dense.to_sparse_csr(),
        "quantised": torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "meta": torch.empty(2, device="meta"),
        "packed_float4": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }.items():
        torch.save({"layer": {"weight": tensor}}, HERE / f"refused_{name}.pt")
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), stream)
    (HERE / "refused_torchscript.pt").write_bytes(stream.getvalue())


def own_source_only(cls: type) -> tuple[list[str], int, str | None]:
    """Legacy files embed the classes' sources; PyTorch's own would only make them large."""
    if cls.__module__ != "__main__":
        raise OSError
    lines, first, _ = torch._sources.get_source_lines_and_file(cls)
    return lines, first, pathlib.Path(__file__).name


def main() -> None:
    setattr(torch.serialization, "get_source_lines_and_file", own_source_only)  # noqa: B010
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    readable()
    safetensors_files()
    refused()
    (HERE / "expected.json").write_text(json.dumps(EXPECTED, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
