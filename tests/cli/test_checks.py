"""What is checked before a command trains or writes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad.cli import main
from jaxgrad.cli._classifier import Classifier

PRETRAIN = ["pretrain", "--hidden", "4", "--epochs", "1", "--batch-size", "128", "--out", "out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "model"
    made = Classifier.create((4,), 784, 10, seed=0)
    made.save(path, made.params, (), overwrite=False)
    return str(path)


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """An empty directory to work in, in which nothing may be trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jg, "fit", lambda *args, **kwargs: pytest.fail("it trained first"))
    return tmp_path


def failure(capsys, *argv):
    """The one line that a command ends with."""
    status = main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("jaxgrad: ") and err.count("\n") == 1
    return err.removeprefix("jaxgrad: ").rstrip()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--epochs 0", "--epochs 0; it must be 1 or more."),
        ("--batch-size -1", "--batch-size -1; it must be 1 or more."),
        ("--hidden 4 0", "--hidden 0; it must be 1 or more."),
        ("--learning-rate -1", "--learning-rate -1.0; it must be 0 or more."),
        ("--learning-rate inf", "--learning-rate inf; it must be 0 or more."),
        ("--learning-rate nan", "--learning-rate nan; it must be 0 or more."),
        ("--momentum 1.5", "--momentum 1.5; it must be from 0 to 1."),
        ("--patience -1", "--patience -1; it must be 0 or more."),
        ("--seed -1", "--seed -1; it must be from 0 to 4294967295."),
        ("--seed 4294967296", "--seed 4294967296; it must be from 0 to 4294967295."),
        ("--classes 0 -1", "--classes -1; it must be from 0 to 9999."),
        ("--classes 0 12", "--classes: the data has no example with the label 12."),
        ("--classes 12 13", "--classes 12, 13 leaves no digit; the digits are 0 to 9."),
        ("--process-id -1", "--process-id -1; it must be 0 or more."),
        ("--resume", "--resume needs the directory of the run: --checkpoint PATH."),
        ("--plot p.xyz", "--plot p.xyz ends in '.xyz'; a plot is saved as .png, .svg, .pdf."),
        ("--plot p", "--plot p has no suffix; a plot is saved as .png, .svg, .pdf."),
        ("--log .", "--log . is a directory; name a file."),
        ("--log out/log", "--log out/log is within --out out, which the model is to fill alone."),
        ("--checkpoint out", "--checkpoint out is within --out out, which the model is to fill"),
    ],
)
def test_a_number_or_a_name_that_can_not_be_meant(untrained, capsys, options, text):
    assert failure(capsys, *PRETRAIN, *options.split()).startswith(text)
    assert not [*untrained.iterdir()]


@pytest.mark.parametrize("option", ["out", "log", "plot", "checkpoint", "tensorboard"])
def test_what_lies_below_a_file_is_found_before_the_training(untrained, capsys, option):
    file = untrained / "file"
    file.touch()
    error = failure(capsys, *PRETRAIN, f"--{option}", "file/a.png")
    assert error.startswith(f"--{option}: '{file}/a.png")
    assert error.endswith(f"can't be written: '{file}' is not a directory.")
    assert [*untrained.iterdir()] == [file]


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("--plot=a.png", "matplotlib", "cli"), ("--tensorboard=a", "tensorboardX", "tensorboard")],
)
def test_an_extra_that_is_missing_is_found_before_the_training(
    untrained, monkeypatch, capsys, option, module, extra
):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    error = failure(capsys, *PRETRAIN, option)
    assert f"pip install 'jaxgrad[{extra}]'" in error and f"'{module}" in error


def test_finetune_checks_before_it_pretrains(untrained, capsys):
    assert failure(capsys, "finetune", "--plot", "p.xyz").startswith("--plot p.xyz ends in")
    assert failure(capsys, "finetune", "--classes", "5", "12").startswith("--classes: the data")
    assert not [*untrained.iterdir()]


def test_numbers_of_audit_and_graph(model, untrained, capsys):
    for command, options in (
        ("graph", ("--batch-size 0", "--depth -1")),
        ("audit", ("--batch-size 0", "--steps 0", "--clip -1", "--weight-decay -1")),
    ):
        for option in options:
            error = failure(capsys, command, "--from", model, *option.split())
            assert error.startswith(f"{option}") and "it must be" in error
    assert not [*untrained.iterdir()]


def test_folders_that_are_missing_are_made(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argv in (
        ["convert", model, "a/b/model.pt"],
        ["graph", "--from", model, "--out", "c/d/graph.mmd"],
    ):
        assert main(argv) == 0
        assert Path(argv[-1]).is_file()


def test_outputs_of_convert_and_graph(model, untrained, capsys):
    (untrained / "file").touch()
    assert failure(capsys, "convert", model, "file/a.pt").startswith("OUT: '")
    assert failure(capsys, "graph", "--from", model, "--out", "file/a.svg").startswith("--out: '")
    error = failure(capsys, "graph", "--from", model, "--out", ".")
    assert error == "--out . is a directory; name a file."


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([["a"] * 28] * 28), "holds str32; images are uint8, or numbers between 0 and 1."),
        (np.full((28, 28), 0.5 + 0.5j, np.complex64), "holds complex64; images are uint8"),
        (np.array([[None] * 28] * 28), "can't be read: it is not a NumPy file of numbers"),
    ],
)
def test_arrays_that_are_no_images(model, tmp_path, capsys, array, text):
    file = tmp_path / "array.npy"
    np.save(file, array)
    assert f"'{file}' {text}" in failure(capsys, "predict", file, "--from", model)


def test_archives_without_arrays(model, tmp_path, capsys):
    file = tmp_path / "empty.npz"
    np.savez(file)
    error = failure(capsys, "predict", file, "--from", model)
    assert error == f"'{file}' can't be read: it holds nothing; expected one array"
    error = failure(capsys, *PRETRAIN, "--data", file)
    assert error == f"'{file}' has no x_train, y_train, x_test, y_test; it has nothing."


def test_a_model_that_can_not_be_saved_at_last_is_saved_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fit = jg.fit

    def taken_meanwhile(*args, **kwargs):
        (tmp_path / "out").mkdir()
        return fit(*args, **kwargs)

    monkeypatch.setattr(jg, "fit", taken_meanwhile)
    assert main(PRETRAIN) == 1
    error = capsys.readouterr().err
    assert "jaxgrad: --out: '" in error and "/out' exists." in error
    where = Path(error.rpartition("The trained model is saved in '")[2].partition("'")[0])
    assert jg.inspect(where).config["hidden"] == [4]


def test_the_model_is_saved_before_it_is_plotted(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device", "p.png")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxgrad.callbacks.plot_history", fail)
    assert main([*PRETRAIN, "--plot", "p.png"]) == 1
    assert capsys.readouterr().err == "jaxgrad: 'p.png': No space left on device.\n"
    assert jg.inspect("out").config["hidden"] == [4]


def test_patience_keeps_the_best_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["pretrain", "--hidden", "8", "--out", "out", "--log", "log", "--patience", "1"]
    # So large a rate that the accuracy falls again.
    assert main([*argv, "--epochs", "9", "--learning-rate", "0.3", "--batch-size", "32"]) == 0
    records = [json.loads(line) for line in Path("log").read_text().splitlines()]
    found = [record["test_accuracy"] for record in records]
    assert max(found) > found[-1]
    assert jg.inspect("out").config["accuracy"] == pytest.approx(max(found))
    epoch = found.index(max(found)) + 1
    out = capsys.readouterr().out
    assert f"Kept the weights of epoch {epoch}, the best of {len(found)}" in out
