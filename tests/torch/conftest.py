"""Writes small files in PyTorch's containers, from hand-made pickles."""

import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping

import pytest

PROTOCOL = b"\x80\x02"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    return pathlib.Path(__file__).parents[1] / "goldens" / "torch_files"


@pytest.fixture
def write_zip(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """`write_zip(body, {"0": bytes}) -> path`; the body lacks the protocol and the STOP."""

    def write(
        body: bytes, storages: Mapping[str, bytes] | None = None, **entries: bytes
    ) -> pathlib.Path:
        path = tmp_path / "made.pt"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("made/data.pkl", PROTOCOL + body + b".")
            for key, content in (storages or {}).items():
                file.writestr(f"made/data/{key}", content)
            for name, content in entries.items():
                file.writestr(f"made/{name}", content)
        return path

    return write


@pytest.fixture
def write_legacy(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """`write_legacy(body, {"0": (count, bytes)}) -> path`."""

    def write(
        body: bytes,
        storages: Mapping[str, tuple[int, bytes]] | None = None,
        protocol: object = 1001,
        system: object = None,
    ) -> pathlib.Path:
        storages = storages or {}
        path = tmp_path / "made.pt"
        parts = [MAGIC, pickle.dumps(protocol, 2)]
        parts.append(pickle.dumps({"little_endian": True} if system is None else system, 2))
        parts += [PROTOCOL + body + b".", pickle.dumps(list(storages), 2)]
        parts += [struct.pack("<q", count) + content for count, content in storages.values()]
        path.write_bytes(b"".join(parts))
        return path

    return write


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def storage(key: str, numel: int, kind: str = "FloatStorage", legacy: bool = False) -> bytes:
    fields = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    return b"(" + fields + integer(numel) + (b"N" if legacy else b"") + b"tQ"


def tensor(
    made: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], rest: bytes = b""
) -> bytes:
    """A call of `_rebuild_tensor_v2`; `rest` is what follows the backward hooks."""
    arguments = made + integer(offset) + ints(shape) + ints(strides) + b"\x89N" + rest
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


class Body:
    """The pieces of hand-made pickles, for tests."""

    text = staticmethod(text)
    integer = staticmethod(integer)
    storage = staticmethod(storage)
    tensor = staticmethod(tensor)


@pytest.fixture(scope="session")
def body() -> type[Body]:
    return Body
