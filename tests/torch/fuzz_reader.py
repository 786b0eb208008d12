"""Feeds the reader damaged and hostile files: `python tests/torch/fuzz_reader.py --cases 200000`.

Every case is a golden file, mutated: bytes flipped, cut, repeated and overwritten; zip entries
renamed, resized, moved and repacked with right checksums around a mutated pickle; pickles mutated
opcode by opcode, with hostile fragments put in; safetensors headers and indexes with odd values.
The reader must return or raise `TorchFileError`; what it returns must be readable to the last
element. Anything else, a slow case, or an event of running code, stops the run with the case's
number, from which (and the seed) the case can be made again.
"""

import argparse
import collections
import faulthandler
import io
import json
import pathlib
import pickle
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jaxgrad.torch as jgt

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "torch_files"
SECONDS_PER_CASE = 5
EXTRA_BYTES = 2 << 30
RUNS_CODE = (
    *("exec", "compile", "import", "pickle.find_class", "marshal.loads", "code.__new__"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.remove"),
    *("socket.connect", "ctypes.dlopen", "shutil.rmtree", "os.rename"),
)
INTERESTING = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
HOSTILE = (
    b"cos\nsystem\nX\x04\0\0\0true\x85R",  # REDUCE of os.system
    b"cbuiltins\neval\nX\x011\x85R",
    b"cbuiltins\ngetattr\nX\x01\0\0\0aX\x01\0\0\0b\x86R",
    b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__NsbN",  # BUILD on a global
    b"\x82\x01",  # EXT1
    b"\x84\x01\0\0\0",  # EXT4
    b"ios\nsystem\n",  # INST
    b"X\x04\0\0\0true(cos\nsystem\no",  # OBJ
    b")" + b"\x85" * 3000,  # deep tuple
    b"}" + b")" + b"\x85" * 3000 + b"Ns",  # ... as a key
    b"](" * 2000,
    b"X\x07\0\0\0storage\x85Q",
    b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\00X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQ",
    b"(X\x06\0\0\0modulecos\nsystem\nNNtQ",
    b"NQ",
    b"\x8b\xff\xff\xff\x7f",  # LONG4 of 2 GB
    b"X\xff\xff\xff\xff",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x97",  # NEXT_BUFFER
    b"]q\x00h\x00a",  # a list holding itself
    b"}q\x00X\x01\0\0\0ah\x00s",  # a dict holding itself
    b"]" + b"q\x00]h\x00ah\x00a" * 40,  # exponentially many paths
    b")" + b"2\x86" * 60,
    b"(" * 3000,
    b"0",
    b"1",
    b"r\xff\xff\xff\xff",
    b"j\xff\xff\xff\xff",
    b"c" + b"a" * 5000 + b"\nb\n",
    b"cbuiltins\nset\n]q\x00" + b"N" * 20 + b"\x85R",
    b"\x8f(K\x01]\x90",
)

Mutate = Callable[[random.Random, bytes], bytes]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out))
        out[at] = rng.choice((out[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(out)


def overwrite_integer(rng: random.Random, data: bytes) -> bytes:
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("<", ">"))
    value = rng.choice(INTERESTING) % (1 << 8 * size)
    packed = value.to_bytes(size, "little" if order == "<" else "big")
    at = rng.randrange(max(1, len(data) - size))
    return data[:at] + packed + data[at + size :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 512)))


def delete(rng: random.Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:start] + data[stop:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    return data[:stop] + data[start:stop] * rng.choice((1, 2, 50)) + data[stop:]


def move(rng: random.Random, data: bytes) -> bytes:
    start, stop = span(rng, data)
    to = rng.randrange(len(data))
    return data[:to] + data[start:stop] + data[to:]


BYTES: tuple[Mutate, ...] = (overwrite, overwrite_integer, truncate, delete, repeat, move)


def tokens(data: bytes) -> list[bytes]:
    """A pickle cut into opcodes with their arguments."""
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    ends = [*starts[1:], len(data)]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    ops = tokens(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(1, len(ops))
        kind = rng.randrange(8)
        if kind == 0:
            del ops[at]
        elif kind == 1:
            ops.insert(at, rng.choice(ops))
        elif kind == 2:
            ops[at] = rng.choice(ops)
        elif kind == 3:
            ops.insert(at, rng.choice(HOSTILE))
        elif kind == 4:
            ops[at] = rng.choice((pickle.NONE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, b")", b"\x88"))
        elif kind == 5:
            value = rng.choice((*INTERESTING, -1, -(2**31), -(2**63), 2**200))
            ops[at] = pickle.dumps(value, 2)[2:-1]
        elif kind == 6:
            other = rng.randrange(1, len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        else:
            ops[at] = overwrite(rng, ops[at])
        if len(ops) < 2:
            break
    return b"".join(ops)


def kind_of(op: bytes) -> str:
    """Opcodes of one kind can stand for each other without upsetting the stack."""
    first = op[:1]
    kinds = {"text": b"X\x8c", "integer": b"KMJ\x8a\x8b", "get": b"hj", "constant": b"N\x88\x89)]}"}
    return next((kind for kind, codes in kinds.items() if first in codes), first.hex())


def exchange(rng: random.Random, data: bytes) -> bytes:
    """Some arguments replaced by others of their kind: well-formed, and wrong."""
    ops = tokens(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(1, len(ops) - 1)
        kind = kind_of(ops[at])
        if kind == "integer" and rng.random() < 0.5:
            value = rng.choice((*INTERESTING, -1, -(2**63), 2**200, rng.randrange(100)))
            ops[at] = pickle.dumps(value, 2)[2:-1]
        else:
            ops[at] = rng.choice([op for op in ops if kind_of(op) == kind])
    return b"".join(ops)


def repack(rng: random.Random, data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The zip with some entries changed, and right checksums and offsets."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def mutate_zip_pickle(rng: random.Random, data: bytes) -> bytes:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        return rng.choice((mutate_pickle, exchange))(rng, content)

    return repack(rng, data, change)


def mutate_zip_entry(rng: random.Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as source:
        target = rng.choice(source.namelist())
    bad = rng.choice(BYTES)
    return repack(rng, data, lambda n, c: bad(rng, c) if n == target and c else c)


def mutate_zip_layout(rng: random.Random, data: bytes) -> bytes:
    """Other names, compression, encryption bits, order and repetition of the entries."""
    out = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(out, "w") as target,
    ):
        names = source.namelist()
        for name in rng.sample(names, len(names)) if rng.random() < 0.3 else names:
            kind = rng.randrange(12)
            content = source.read(name)
            if kind == 0:
                continue
            if kind == 1:
                target.writestr(rng.choice(names), content)
            if kind == 2:
                name = overwrite(rng, name.encode()).decode("latin-1").replace("\0", "")
            method = zipfile.ZIP_DEFLATED if kind == 3 else zipfile.ZIP_STORED
            target.writestr(name or "x", content, method)
    return out.getvalue()


def mutate_zip_records(rng: random.Random, data: bytes) -> bytes:
    """Sizes, offsets, flags and counts in the zip's own records."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        signature = rng.choice((b"PK\1\2", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"))
        places = [at for at in range(len(out)) if out[at : at + 4] == signature]
        if not places:
            continue
        at = rng.choice(places) + rng.randrange(4, 46, 2)
        size = rng.choice((2, 4))
        old = int.from_bytes(out[at : at + size], "little")
        value = rng.choice((*INTERESTING, old + 1, old - 1, old * 2, rng.randrange(len(out))))
        out[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def mutate_legacy(rng: random.Random, data: bytes) -> bytes:
    """One of the five pickles changed, the rest kept."""
    stream, parts = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        collections.deque(pickletools.genops(stream), maxlen=0)
        parts.append(data[start : stream.tell()])
    rest = data[stream.tell() :]
    index = rng.choice((1, 2, 3, 3, 3, 4))
    if rng.random() < 0.2:
        rest = rng.choice(BYTES)(rng, rest) if rest else rest
    else:
        parts[index] = rng.choice((mutate_pickle, exchange))(rng, parts[index])
    return b"".join(parts) + rest


def odd_json(rng: random.Random, value: Any) -> Any:
    """The value with something odd in some place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = {**value, key: odd_json(rng, value[key])}
        if rng.random() < 0.1:
            changed[rng.choice(("__metadata__", "", "x" * 99, "é"))] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], odd_json(rng, value[at]), *value[at + 1 :]]
    odd = (None, True, -1, 1.5, 2**70, "F32", "../x", "F64", [], {}, [[]], "x" * 5000, float("nan"))
    return rng.choice((*odd, *INTERESTING))


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    changed = json.dumps(odd_json(rng, header)).encode()
    if rng.random() < 0.1:
        changed = rng.choice(BYTES)(rng, changed)
    if rng.random() < 0.05:
        changed = b'{"a":' * 5000 + changed + b"}" * 5000
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


def mutate_index(rng: random.Random, data: bytes) -> bytes:
    return json.dumps(odd_json(rng, json.loads(data))).encode()


def mutators(name: str, data: bytes) -> tuple[Mutate, ...]:
    if data[:4] == b"PK\3\4":
        shaped = (mutate_zip_layout, mutate_zip_entry, mutate_zip_records)
        return (*BYTES, *shaped, *[mutate_zip_pickle] * 12)
    if name.endswith(".json"):
        return (*BYTES, *[mutate_index] * 6)
    if name.endswith(".safetensors"):
        return (*BYTES, *[mutate_safetensors] * 10)
    return (*BYTES, *[mutate_legacy] * 10)


def seeds() -> list[tuple[str, bytes]]:
    paths = [p for p in sorted(GOLDENS.iterdir()) if p.suffix in (".pt", ".bin", ".safetensors")]
    paths += sorted(GOLDENS.glob("*.index.json"))
    # Big files are slow to mutate, and small ones have the same structures; `zipfile` can not
    # repack a file without checksums.
    paths = [path for path in paths if path.stat().st_size < 10_000]
    return [(path.name, path.read_bytes()) for path in paths if "without" not in path.name]


def case(files: list[tuple[str, bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """The name and the content of one case."""
    rng = random.Random(f"{seed}/{number}")
    name, data = rng.choice(files)
    data = rng.choice(mutators(name, data))(rng, data)
    if data and rng.random() < 0.1:
        data = rng.choice(BYTES)(rng, data)
    return name, data


class Ran(BaseException):
    """Code ran, or a case took too long."""


def watch() -> Callable[[bool], None]:
    """Raises on every event that comes with running code, while switched on."""
    on = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if on and event.startswith(RUNS_CODE):
            raise Ran(f"{event} {args!r:.200}")

    def switch(to: bool) -> None:
        nonlocal on
        on = to

    sys.addaudithook(hook)
    return switch


def expire(*_: Any) -> None:
    raise Ran(f"more than {SECONDS_PER_CASE} s")


def outcome(path: pathlib.Path) -> str:
    try:
        checkpoint = jgt.read(path)
    except jgt.TorchFileError as error:
        refusal = error
    else:
        repr(checkpoint)
        for array in checkpoint.tensors.values():
            assert not array.flags.writeable
            if array.nbytes < 1 << 24:
                array.tobytes()
            elif array.size:
                _ = array[(0,) * array.ndim], array[(-1,) * array.ndim]
        return "read"
    assert str(path.parent) in str(refusal)
    assert refusal.reason
    assert len(str(refusal)) < 1000
    return "refused"


def run(cases: Iterator[int], seed: int, report: Callable[[int, dict], None]) -> dict[str, int]:
    """How many cases were read and refused; raises on the first that did anything else."""
    outcomes: collections.Counter[str] = collections.Counter()
    files = seeds()
    switch = watch()
    signal.signal(signal.SIGALRM, expire)
    with tempfile.TemporaryDirectory() as folder:
        for shard in GOLDENS.glob("*-of-*"):
            (pathlib.Path(folder) / shard.name).write_bytes(shard.read_bytes())
        for path in GOLDENS.glob("*_zip.pt"):
            outcome(path)  # whatever is imported late is imported now
        for number in cases:
            name, data = case(files, seed, number)
            path = pathlib.Path(folder, f"case-{name}")
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
            switch(True)
            try:
                outcomes[outcome(path)] += 1
            except BaseException:
                print(f"case {number} of seed {seed}, made from {name}", file=sys.stderr)
                raise
            finally:
                switch(False)
                signal.setitimer(signal.ITIMER_REAL, 0)
            report(number, outcomes)
    return dict(outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzzes jaxgrad.torch.read.")
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, hard))
    start = time.perf_counter()

    def report(number: int, outcomes: dict) -> None:
        if number % 10_000 == 0:
            print(f"{number} {dict(outcomes)} {time.perf_counter() - start:.0f} s", flush=True)

    numbers = iter(range(options.first, options.first + options.cases))
    outcomes = run(numbers, options.seed, report)
    seconds = time.perf_counter() - start
    print(f"{sum(outcomes.values())} cases in {seconds:.0f} s: {outcomes}; nothing else happened")


if __name__ == "__main__":
    main()
