import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxgrad as jg
from jaxgrad import data
from jaxgrad.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory in which a small model was pretrained and fine-tuned."""
    path = tmp_path_factory.mktemp("runs")
    fast = ["--batch-size", "32", "--learning-rate", "0.1"]
    pretrained, finetuned = str(path / "pretrained"), str(path / "finetuned")
    assert main(["pretrain", "--hidden", "16", "--epochs", "2", "--out", pretrained, *fast]) == 0
    assert main(["finetune", "--from", pretrained, "--out", finetuned, "--epochs", "6", *fast]) == 0
    return path


def output(capsys, *argv):
    status = main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return status, out, err


def flat(path):
    info = jg.inspect(path)
    tree = jg.load(path, into=dict(info.leaves))
    return tree


def test_finetune_moves_the_head_and_nothing_else(runs):
    before, after = flat(runs / "pretrained"), flat(runs / "finetuned")
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {"head/bias", "head/kernel"} == set(jg.inspect(runs / "finetuned").trained)
    assert jg.inspect(runs / "pretrained").config["accuracy"] > 0.6
    assert jg.inspect(runs / "finetuned").config["accuracy"] > 0.4


def test_finetune_reports_what_it_trains(runs, capsys):
    argv = ["finetune", "--from", runs / "pretrained", "--out", runs / "b", "--epochs", "1"]
    status, out, err = output(capsys, *argv, "--train", "**/bias", "!head/**")
    assert status == 0 and err == ""
    assert "12,730 elements, 50.9 kB, 16 trained" in out
    assert "0.0% before" in out
    assert "mean loss" in out
    assert jg.inspect(runs / "b").trained == ("layers/0/bias",)


@pytest.mark.slow
def test_finetune_pretrains_where_there_is_nothing_to_start_from(tmp_path, monkeypatch, capsys):
    from jaxgrad.cli import pretrain

    small = dict(hidden=(8,), epochs=1)
    real = pretrain.Pretrain
    monkeypatch.setattr("jaxgrad.cli.finetune.Pretrain", lambda **kw: real(**kw, **small))
    monkeypatch.chdir(tmp_path)
    status, out, _ = output(capsys, "finetune", "--epochs", "1")
    assert status == 0
    assert out.index("Pretraining on 720 rows") < out.index("Accuracy on 180 other rows")
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["finetuned", "pretrained"]
    status, out, _ = output(capsys, "finetune", "--epochs", "1")  # and then starts from it
    assert status == 0 and "Pretraining" not in out


def test_inspect(runs, capsys):
    status, out, err = output(capsys, "inspect", runs / "finetuned")
    assert status == 0 and err == ""
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["head/bias", "10", "float32", "40 B", "trained"],
        ["head/kernel", "16 x 10", "float32", "640 B", "trained"],
        ["layers/0/bias", "16", "float32", "64 B", "frozen"],
        ["layers/0/kernel", "784 x 16", "float32", "50.2 kB", "frozen"],
    ]
    assert "trained_on: [5, 6, 7, 8, 9]" in out


def predicted(out):
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    return [int(row[2]) for row in rows]


def test_predict_reads_pictures_and_arrays(runs, tmp_path, capsys):
    images = data.digits().test["image"][:4]
    whole = (images * 255).astype(np.uint8)
    Image.fromarray(whole[0]).resize((56, 56)).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(255 - whole[0]).save(tmp_path / "ink.png")
    np.save(tmp_path / "many.npy", images)
    np.save(tmp_path / "flat.npy", images.reshape(4, 784))
    np.savez(tmp_path / "bytes.npz", whole)
    model = ["predict", "--from", runs / "pretrained"]

    def read(*argv):
        status, out, err = output(capsys, *model, *argv)
        assert status == 0 and err == ""
        return predicted(out)

    many = read(tmp_path / "many.npy")
    assert len(many) == 4
    assert many == read(tmp_path / "flat.npy") == read(tmp_path / "bytes.npz")
    assert read(tmp_path / "a.png") == read("--invert", tmp_path / "ink.png") == many[:1]
    assert read(tmp_path / "a.png", tmp_path / "many.npy") == many[:1] + many


MODEL = Path(__file__).parents[1] / "goldens" / "mnist_model.pt"


def test_the_tutorials_model_from_pytorch(tmp_path, capsys):
    """A whole module, read without PyTorch: look at it, predict on noise, re-train its head."""
    golden = np.load(MODEL.with_suffix(".npz"))
    out = output(capsys, "inspect", MODEL)[1]
    assert "fc1.weight" in out and "8 x 784" in out
    assert "(fc3): Linear(in_features=8, out_features=10)" in out

    np.save(tmp_path / "noise.npy", golden["pixels"])
    status, out, _ = output(capsys, "predict", tmp_path / "noise.npy", "--from", MODEL)
    assert status == 0
    assert predicted(out) == golden["logits"].argmax(1).tolist()

    argv = ["finetune", "--from", MODEL, "--out", tmp_path / "a", "--epochs", "2"]
    status, out, err = output(capsys, *argv)
    assert status == 0 and err == ""
    assert out.startswith("Predictions on noise: ")
    before, after = jg.torch.read(MODEL).tensors, flat(tmp_path / "a")
    assert jg.inspect(tmp_path / "a").trained == ("fc3/bias", "fc3/kernel")
    for layer, moved in (("fc1", False), ("fc2", False), ("fc3", True)):
        assert (before[f"{layer}.bias"] != after[f"{layer}/bias"]).any() == moved
        assert (after[f"{layer}/kernel"] != before[f"{layer}.weight"].T).any() == moved

    # What was saved is a model again: to go on with, to predict with, and to take back.
    again = ["finetune", "--from", tmp_path / "a", "--out", tmp_path / "b", "--epochs", "1"]
    assert output(capsys, *again, "--train", "fc2/**")[0] == 0
    assert output(capsys, "predict", tmp_path / "noise.npy", "--from", tmp_path / "b")[0] == 0
    assert output(capsys, "convert", tmp_path / "a", tmp_path / "back.pt")[0] == 0
    back = jg.torch.read(tmp_path / "back.pt").tensors
    np.testing.assert_array_equal(back["fc3.weight"].T, after["fc3/kernel"])
    np.testing.assert_array_equal(back["fc1.weight"], before["fc1.weight"])


def test_convert(tmp_path, capsys):
    before = jg.torch.read(MODEL).tensors
    for suffix in (".pt", ".safetensors"):
        file = tmp_path / f"a{suffix}"
        assert output(capsys, "convert", MODEL, file)[0] == 0
        after = jg.torch.read(file).tensors
        assert list(after) == list(before)
        assert all((after[name] == before[name]).all() for name in before)
    status, out, _ = output(capsys, "convert", MODEL, tmp_path / "model")
    assert status == 0 and "a Flax model, 6 parameters in Flax's layouts" in out
    np.testing.assert_array_equal(flat(tmp_path / "model")["fc1/kernel"], before["fc1.weight"].T)
    # A bare state dict has no layer types: its layouts stay, and that is said.
    status, out, _ = output(capsys, "convert", tmp_path / "a.pt", tmp_path / "bare")
    assert status == 0 and "6 tensors, in PyTorch's names and layouts" in out
    np.testing.assert_array_equal(flat(tmp_path / "bare")["fc1/weight"], before["fc1.weight"])

    status, _, err = output(capsys, "convert", MODEL, tmp_path / "model")
    assert status == 1 and "exists; pass --overwrite to replace it." in err
    assert output(capsys, "convert", MODEL, tmp_path / "model", "--overwrite")[0] == 0
    status, _, err = output(capsys, "convert", tmp_path / "model", tmp_path / "other")
    assert status == 1 and "is a checkpoint already: OUT must end in one of .pt" in err
    status, _, err = output(capsys, "convert", tmp_path / "a.pt", tmp_path / "c", "--part", "x")
    assert status == 1 and "no name in" in err


def test_layers_that_run_in_an_order_of_ones_own(tmp_path, capsys):
    steps = ["flatten", "fc1", "gelu", "fc2", "relu2", "fc3"]
    argv = ["finetune", "--from", MODEL, "--out", tmp_path / "a", "--epochs", "1"]
    assert output(capsys, *argv, "--forward", *steps)[0] == 0
    assert jg.inspect(tmp_path / "a").config["forward"] == steps
    np.save(tmp_path / "noise.npy", np.ones((1, 28, 28), np.float32))
    assert output(capsys, "predict", tmp_path / "noise.npy", "--from", tmp_path / "a")[0] == 0
    status, _, err = output(capsys, *argv, "--forward", "fc1", "rleu")
    assert status == 1
    assert "--forward rleu: neither a layer of the module (flatten, fc1" in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["inspect", "{}/text.png"], "neither a torch.save file nor safetensors"),
        (["finetune", "--from", "{}/state.pt"], "it doesn't show how the model is built"),
        (["inspect", "{}/nowhere"], "no checkpoint at '{}/nowhere': there is no such directory."),
        (["inspect", "{}"], "'{}' is not an Orbax checkpoint, or a damaged one."),
        (["predict", "--from", "{}/pretrained"], "name at least one image or array file."),
        (["predict", "--from", "{}/pretrained", "{}/no.png"], "no file '{}/no.png'."),
        (
            ["predict", "--from", "{}/pretrained", "{}/text.png"],
            "'{}/text.png' can't be read: cannot",
        ),
        (["predict", "--from", "{}/pretrained", "{}/small.npy"], "holds [5, 5]; the model takes"),
        (
            ["predict", "--from", "{}/pretrained", "{}/wild.npy"],
            "holds values from -3 to -3; images",
        ),
        (["predict", "--from", "{}/pretrained", "{}/two.npz"], "it holds a, b; expected one array"),
        (["predict", "--from", "{}/pretrained", "{}/empty.npy"], "'{}/empty.npy' can't be read"),
        (["predict", "--from", "{}/pretrained", "{}/junk.npz"], "'{}/junk.npz' can't be read"),
        (["predict", "--from", "{}/other", "{}/small.npy"], "was not saved by `jaxgrad pretrain`"),
        (["finetune", "--from", "{}/nowhere"], "no model at '{}/nowhere': make one with"),
        (["convert", "{}/nowhere", "{}/x"], "there is no file or checkpoint at '{}/nowhere'."),
        (
            ["finetune", "--from", "{}/pretrained", "--train", "haed/**"],
            "--train pattern 'haed/**' matches no leaf. Did you mean 'head'",
        ),
        (["finetune", "--from", "{}/pretrained", "--epochs", "0"], "--epochs 0; it must be 1"),
        (
            ["finetune", "--from", "{}/pretrained", "--out", "{}/x", "--learning-rate", "1e38"],
            "at step",
        ),
        (
            ["finetune", "--from", "{}/pretrained", "--data", "{}/mnist"],
            "no data at '{}/mnist': there is no such file or directory.",
        ),
        (["pretrain", "--classes", "12"], "--classes 12 leaves no digit; the digits are 0 to 9."),
        (
            ["pretrain", "--hidden", "4", "--epochs", "1", "--out", "{}/pretrained"],
            "'{}/pretrained' exists. Choose another path, or pass --overwrite.",
        ),
    ],
)
def test_user_errors_are_one_line_and_status_one(runs, tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(
        tmp_path
    )  # the model that `jaxgrad finetune` leaves in a checkout is no fault
    (runs / "text.png").write_text("not a picture")
    (runs / "empty.npy").write_bytes(b"")
    (runs / "junk.npz").write_bytes(b"PK\x03\x04junk")
    np.save(runs / "small.npy", np.ones((5, 5)))
    np.save(runs / "wild.npy", np.full((28, 28), -3.0))
    np.savez(runs / "two.npz", a=np.ones(2), b=np.ones(2))
    jg.torch.save_tensors({"fc.weight": np.ones((2, 2), np.float32)}, runs / "state.pt")
    if not (runs / "other").exists():
        jg.save(runs / "other", {"w": np.ones(2)})
    status, _, err = output(capsys, *(arg.format(runs) for arg in argv))
    assert status == 1
    assert err.startswith("jaxgrad: ") and err.count("\n") == 1
    assert text.format(runs) in err


def test_a_taken_directory_is_told_before_the_training(runs, monkeypatch, capsys):
    monkeypatch.setattr(jg, "fit", lambda *args, **kwargs: pytest.fail("it trained first"))
    assert output(capsys, "pretrain", "--out", runs / "pretrained")[0] == 1
    mine = runs / "mine"
    mine.mkdir()
    argv = ["finetune", "--from", runs / "pretrained", "--out", mine]
    status, _, err = output(capsys, *argv)
    assert status == 1 and "exists and is not a checkpoint, so it is not replaced" in err


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["finetune", "--help"], 0),
        (["--tyro-print-completion", "bash"], 0),
        (["fintune"], 2),
        ([], 2),
    ],
)
def test_command_line_errors_and_help(capsys, argv, status):
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert (info.value.code or 0) == status
    out, err = capsys.readouterr()
    assert ("finetune" in out) if status == 0 else ("finetune" in err + out)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["inspect", "x"]) == 1
    assert (
        capsys.readouterr().err == "jaxgrad: the command needs 'tyro': pip install 'jaxgrad[cli]'\n"
    )


def test_version(capsys, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "jaxgrad 1.2.3\n"


def test_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(jg, "inspect", interrupt)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "jaxgrad: interrupted\n"


def test_import_does_not_load_what_it_may_not_need():
    code = (
        "import sys, jaxgrad\n"
        "heavy = {'flax', 'orbax', 'torch', 'rich', 'networkx', 'sklearn', 'tyro', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert jax.__name__ in sys.modules


@pytest.mark.slow
def test_a_run_that_is_ended_by_a_signal_goes_on(runs, tmp_path):
    argv = [
        "--from",
        runs / "pretrained",
        "--checkpoint",
        tmp_path / "run",
        "--out",
        tmp_path / "out",
    ]
    command = [sys.executable, "-c", "import sys; from jaxgrad.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "finetune", *map(str, argv), "--epochs", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    patience = time.monotonic() + 60
    while not any(path.name.isdecimal() for path in tmp_path.glob("run/steps/*")):
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: finishing the step and saving; again to leave at once" in err
    assert "jaxgrad: SIGTERM ended the run at step" in err and "continue it with --resume." in err
    assert "Traceback" not in err and not (tmp_path / "out").exists()
    assert jg.inspect(tmp_path / "run").config["model"] == "mlp"
    epochs = max(int(p.name) for p in tmp_path.glob("run/steps/*")) // 12 + 2
    assert main(["finetune", *map(str, argv), "--resume", "--epochs", str(epochs)]) == 0
    assert (tmp_path / "out").is_dir()


def test_records_and_pictures(runs, tmp_path, capsys):
    argv = ["finetune", "--from", runs / "pretrained", "--out", tmp_path / "out", "--epochs", "9"]
    argv += ["--log", tmp_path / "log.jsonl", "--plot", tmp_path / "plots/a.png"]
    argv += ["--tensorboard", tmp_path / "board", "--patience", "0", "--schedule", "cosine"]
    argv += ["--precision", "bfloat16"]
    with jax.numpy_dtype_promotion("standard"):  # for Optax's schedule
        status, out, err = output(capsys, *argv, "--checkpoint", tmp_path / "run")
    assert status == 0, err
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert "test_accuracy" in records[0] and f"in epoch {records[-1]['epoch'] + 1}" in out
    assert (tmp_path / "plots/a.png").stat().st_size > 10_000
    assert list((tmp_path / "board").iterdir())
    status, _, err = output(capsys, *argv, "--checkpoint", tmp_path / "run")
    assert status == 1 and "holds a run, of step" in err and "Continue it with --resume" in err
    status, _, err = output(capsys, *argv, "--resume")
    assert status == 1 and "--resume needs the directory of the run: --checkpoint PATH" in err
