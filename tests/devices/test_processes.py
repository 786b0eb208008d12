import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad._devices import processes as _processes
from jaxgrad.cli import main

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def outputs(commands):
    """What processes print that run at the same time."""
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        done = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0] * len(running), done
    return [out for out, _ in done]


def trained(processes, directory):
    port = free_port()
    common = ["-m", "tests.two_processes", "--processes", str(processes), "--port", str(port)]
    first, *others = outputs(
        [*common, "--process", str(i), "--directory", str(directory)] for i in range(processes)
    )
    assert not any("losses" in out for out in others)
    return json.loads(first.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    one, two = (trained(n, tmp_path / str(n)) for n in (1, 2))
    for sharding in ("replicated", "fsdp"):
        for found in (one[sharding], two[sharding]):
            assert found["interrupted"] == [6, "SIGTERM"]
            assert found["resumed"] == "resumed at step 6"
            assert found["same bits"] and found["loaded"] and found["staged"]
            assert found["stream interrupted"] == 7 and found["stream same bits"]
            assert found["steps"] == ["10", "12"]
            np.testing.assert_allclose(found["losses"], one["replicated"]["losses"], rtol=1e-5)
            for name in ("staged losses", "stream losses"):
                np.testing.assert_allclose(found[name], one["replicated"][name], rtol=1e-5)


@pytest.mark.slow
def test_the_command_as_two_processes(tmp_path):
    call = ["-c", "import sys; from jaxgrad.cli import main; sys.exit(main(sys.argv[1:]))"]
    source = ["--hidden", "16", "--epochs", "1", "--out", str(tmp_path / "pretrained")]
    outputs([[*call, "pretrain", *source]])
    common = [*call, "finetune", "--from", str(tmp_path / "pretrained"), "--epochs", "2"]
    (alone,) = outputs([[*common, "--out", str(tmp_path / "alone")]])
    common += ["--out", str(tmp_path / "both"), "--checkpoint", str(tmp_path / "run")]
    common += ["--log", str(tmp_path / "log.jsonl"), "--distributed", "--num-processes", "2"]
    common += ["--coordinator", f"localhost:{free_port()}"]
    first, other = outputs([*common, "--process-id", str(i)] for i in range(2))
    report = lambda out: [line for line in out.splitlines() if line.startswith("Trained on")]
    assert report(first) == report(alone) != []
    assert "Trained on" not in other and "Saved" not in other
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    a, b = (
        jg.load(tmp_path / name, into=dict(jg.inspect(tmp_path / name).leaves))
        for name in ("alone", "both")
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_a_process_alone_asks_nobody():
    assert _processes.is_first() and not _processes.several()
    assert _processes.greatest(15) == 15
    assert _processes.from_first([3, 2]) == [3, 2]
    assert _processes.barrier("here") is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--coordinator", "localhost:1"], "belong together, and to --distributed."),
        (["--distributed", "--process-id", "0"], "belong together, and to --distributed."),
    ],
)
def test_half_of_an_address(options, text, tmp_path, capsys):
    assert main(["pretrain", "--out", str(tmp_path / "out"), *options]) == 1
    assert text in capsys.readouterr().err


def test_nobody_says_where_the_others_are(monkeypatch, tmp_path, capsys):
    def initialize(*address):
        assert address == (None, None, None)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    assert main(["finetune", "--out", str(tmp_path / "out"), "--distributed"]) == 1
    assert (
        "--distributed: the processes don't find each other (coordinator_address should be "
        "defined.). Pass their address and number: --coordinator HOST:PORT "
        "--num-processes N --process-id I."
    ) in capsys.readouterr().err
