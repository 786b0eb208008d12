"""Times opening PyTorch files: `jaxgrad.torch.read` against `torch.load(mmap=True)`, in one run.

    python -m benchmarks.torch_read

Both open the same warm files: one with a few big tensors, one with thousands of small ones, and one
with a complete module. Opening only maps the file in both; "and sum" also reads every element, in
NumPy in both. The two alternate, and the report has the median of each.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

import jaxgrad.torch as jgt


def big_state_dict() -> dict[str, torch.Tensor]:
    return {f"layers.{i}.weight": torch.randn(4096, 1024) for i in range(16)}


def many_small() -> dict[str, torch.Tensor]:
    return {f"blocks.{i}.bias": torch.randn(8, 8) for i in range(4000)}


def whole_module() -> torch.nn.Module:
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128)
    return torch.nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)


def open_jaxgrad(path: pathlib.Path) -> list[np.ndarray]:
    return list(jgt.read(path).tensors.values())


def open_checked(path: pathlib.Path) -> list[np.ndarray]:
    return list(jgt.read(path, checksums=True).tensors.values())


def open_torch(path: pathlib.Path) -> list[torch.Tensor]:
    loaded = torch.load(path, mmap=True, weights_only=False)
    return list((loaded if isinstance(loaded, dict) else loaded.state_dict()).values())


def open_torch_weights_only(path: pathlib.Path) -> list[torch.Tensor]:
    return list(torch.load(path, mmap=True, weights_only=True).values())


def total(arrays: list) -> float:
    return sum(float(np.asarray(array).sum()) for array in arrays)


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(path: pathlib.Path, weights_only: bool, repeats: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        "jaxgrad": lambda: open_jaxgrad(path),
        "torch.load(mmap=True)": lambda: open_torch(path),
    }
    if weights_only:
        calls["torch.load(mmap=True, weights_only=True)"] = lambda: open_torch_weights_only(path)
    calls["jaxgrad, checksums=True"] = lambda: open_checked(path)
    calls["jaxgrad and sum"] = lambda: total(open_jaxgrad(path))
    calls["torch.load(mmap=True) and sum"] = lambda: total(open_torch(path))
    measured = medians(calls, repeats)
    reference = measured["torch.load(mmap=True)"]
    print(f"{path.name}: {path.stat().st_size:,} bytes, {len(open_jaxgrad(path))} tensors")
    for name, seconds in measured.items():
        print(f"  {name:<42} {seconds * 1e3:9.2f} ms  {seconds / reference:7.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description="Times opening PyTorch files.")
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (
            ("big", big_state_dict),
            ("small", many_small),
            ("module", whole_module),
        ):
            path = pathlib.Path(folder, f"{name}.pt")
            torch.save(make(), path)
            compare(path, name != "module", repeats)


if __name__ == "__main__":
    main()
