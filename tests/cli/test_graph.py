"""`jaxgrad graph`."""

import pytest

from jaxgrad.cli import main
from jaxgrad.cli._classifier import Classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model as `jaxgrad pretrain` saves it."""
    path = tmp_path_factory.mktemp("runs") / "pretrained"
    made = Classifier.create((16,), 784, 10, seed=0)
    made.save(path, made.params, (), overwrite=False)
    return path


def output(capsys, *argv):
    status = main(["graph", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_checkpoint_is_drawn(model, tmp_path, capsys):
    out = tmp_path / "g.mmd"
    status, text, err = output(capsys, "--from", model, "--out", out)
    assert (status, err) == (0, "")
    assert text.startswith(f"Wrote {out}: ") and text.rstrip().endswith(" edges")
    drawn = out.read_text(encoding="utf-8")
    assert "kernel<br>16 × 10" in drawn and drawn.count(":::trained") > drawn.count("kernel")
    assert output(capsys, "--from", model, "--out", out, "--depth", 1)[0] == 0
    assert "layers/0" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--out", "g.jpg"], "'g.jpg' ends in '.jpg'; a picture is saved as .svg"),
        (["--train", "haed/**"], "Did you mean 'head'"),
        (["--depth", "-1"], "--depth -1; it must be 0 or more."),
    ],
)
def test_errors(model, tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(tmp_path)
    status, _, err = output(capsys, "--from", model, *argv)
    assert status == 1 and text in err and not list(tmp_path.iterdir())
