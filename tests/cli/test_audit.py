"""`jaxgrad audit`: each recipe, by its exit status and what it prints."""

import jax
import jax.numpy as jnp
import pytest

from jaxgrad.cli import main
from jaxgrad.cli._classifier import Classifier


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model as `jaxgrad pretrain` saves it."""
    path = tmp_path_factory.mktemp("runs") / "pretrained"
    made = Classifier.create((16,), 784, 10, seed=0)
    assert jnp.shape(made.params["head"]["kernel"]) == (16, 10)
    made.save(path, made.params, (), overwrite=False)
    return path


def output(capsys, *argv):
    status = main(["audit", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("recipe", ["param-groups", "split", "partition"])
def test_what_is_frozen_well_exits_with_zero(model, capsys, recipe):
    status, out, err = output(capsys, "--from", model, "--recipe", recipe)
    assert (status, err) == (0, "")
    assert "No leaks in 4 steps." in out
    (row,) = [line for line in out.splitlines() if "layers/0/kernel" in line]
    assert "frozen" in row and "! " not in row


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--recipe", "masked"], "its raw gradient passes through"),
        (["--recipe", "freeze-before", "--optimizer", "adamw"], "Why: weight decay"),
        (["--recipe", "freeze-after", "--optimizer", "adam"], "its gradient is computed in each"),
        (["--recipe", "partition", "--clip", "1"], "of the squared gradient norm"),
    ],
)
def test_what_leaks_exits_with_one(model, capsys, argv, text):
    status, out, err = output(capsys, "--from", model, *argv)
    assert status == 1 and text in out
    assert err.startswith(f"jaxgrad: {model} by {argv[1]}: ") and " found." in err
    assert [line for line in out.splitlines() if line.startswith("!  layers/0/kernel")]


def test_patterns_are_those_of_finetune(model, capsys):
    status, out, _ = output(capsys, "--from", model, "--train", "**/bias", "--clip", "1")
    assert status == 0
    trained = [line.split()[0] for line in out.splitlines() if "trained" in line]
    assert trained == ["head/bias", "layers/0/bias"]
    status, _, err = output(capsys, "--from", model, "--train", "haed/**")
    assert status == 1 and "Did you mean 'head'" in err
