import doctest
import json
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad.callbacks import (
    early_stopping,
    evaluate,
    plot_history,
    write_jsonl,
    write_tensorboard,
)

X = jnp.arange(1.0, 8.0)
DATA = {"x": X, "y": 3 * X}


def loss(p, batch):
    return jnp.mean((p * batch["x"] - batch["y"]) ** 2)


def fit(*callbacks, epochs=4, learning_rate=0.01, **options):
    tx = optax.sgd(learning_rate)
    return jg.fit(loss, jnp.array(0.0), DATA, tx, epochs=epochs, callbacks=callbacks, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_evaluation_is_the_mean_over_rows(batch_size):
    metrics = lambda p, b: {"loss": loss(p, b), "n": jnp.array(len(b["x"]))}
    state = fit(evaluate(metrics, DATA, batch_size=batch_size, prefix="val_"))
    np.testing.assert_allclose(
        state.history[-1]["val_loss"], loss(state.params, DATA), rtol=1e-5, atol=1e-12
    )
    sizes = [min(batch_size, 7 - start) for start in range(0, 7, batch_size)]
    assert state.history[-1]["val_n"] == pytest.approx(sum(n * n for n in sizes) / 7)
    with pytest.raises(ValueError, match="batch_size=0; it must be 1 or more"):
        evaluate(metrics, DATA, batch_size=0)
    with pytest.raises(jg.RowsError, match=r"same number of rows .*: 'x' has 7 and 'y' has 3"):
        evaluate(metrics, {"x": X, "y": X[:3]})


def scripted(values):
    """A callback that adds one value of a list after another."""
    return lambda state: {"score": values[len(state.history) - 1]}


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([3, 2, 1, 0, 0, 0, 0, 0], {"patience": 1}, 6),
        ([3, 2, 2.5, 1, 2, 2, 2, 2], {"patience": 1}, 6),
        ([3, 2, 1, 0, 0, 0, 0, 0], {"patience": 0, "mode": "max"}, 2),
        ([1, 2, 3, 3.5, 4, 4.5, 5, 9], {"patience": 1, "mode": "max", "min_delta": 0.9}, 8),
        ([1, 2, 3, 3.1, 3.2, 3.3, 5, 9], {"patience": 1, "mode": "max", "min_delta": 0.9}, 5),
    ],
)
def test_early_stopping(values, options, epochs):
    state = fit(scripted(values), early_stopping("score", **options), epochs=8)
    assert state.step == epochs


def test_a_resumed_run_is_as_patient_as_one_that_did_not_end(tmp_path):
    callbacks = [scripted([3, 2, 2, 2, 2, 2, 2, 2]), early_stopping("score", patience=3)]
    assert fit(*callbacks, epochs=8).step == 6
    assert fit(*callbacks, epochs=4, checkpoint=tmp_path / "run").step == 4
    assert fit(*callbacks, epochs=8, checkpoint=tmp_path / "run", resume=True).step == 6


def test_early_stopping_errors():
    with pytest.raises(ValueError, match="patience=-1; it must be 0 or more"):
        early_stopping("loss", patience=-1)
    with pytest.raises(ValueError, match="mode='least'; it must be 'min' or 'max'"):
        early_stopping("loss", patience=1, mode="least")
    with pytest.raises(ValueError, match=r"the record has no 'val_loss'; it has 'step', 'epoch'"):
        fit(early_stopping("val_loss", patience=1))


def test_jsonl_holds_the_history_once(tmp_path):
    path = tmp_path / "logs/log.jsonl"
    read = lambda: [json.loads(line) for line in path.read_text().splitlines()]
    state = fit(write_jsonl(path), epochs=3, checkpoint=tmp_path / "run")
    assert read() == list(state.history)
    with path.open("a") as file:  # as after a kill between the file and the checkpoint
        file.write('{"step": 4}\n{"st')
    state = fit(write_jsonl(path), epochs=5, checkpoint=tmp_path / "run", resume=True)
    assert read() == list(state.history) and len(read()) == 5
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    # Before there is a writer: its thread imports the module again for each record that it takes.
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxgrad\[tensorboard\]'"):
            write_tensorboard(tmp_path)
    fit(write_tensorboard(tmp_path / "logs"))
    (file,) = (tmp_path / "logs").iterdir()
    assert b"rows_per_s" in file.read_bytes()


def test_the_plot_has_losses_and_the_rest_apart(tmp_path):
    history = [
        {"step": i, "epoch": 0, "loss": 1 / (i + 1), "test_loss": 2.0, "accuracy": i / 9}
        for i in range(9)
    ]
    figure = plot_history(history, tmp_path / "plot.png")
    assert [[line.get_label() for line in axes.lines] for axes in figure.axes] == [
        ["loss", "test_loss"],
        ["accuracy"],
    ]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_history([])


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxgrad\[cli\]'"):
        plot_history([{"step": 1, "loss": 1.0}])


@pytest.mark.parametrize(("tracker", "log"), [("wandb", "log"), ("mlflow", "log_metrics")])
def test_the_recipes_of_the_guide_log_each_record(tracker, log, monkeypatch):
    page = Path(__file__).parent.parent / "docs/guides/callbacks.md"
    examples = doctest.DocTestParser().get_examples(page.read_text())
    scope = {"jax": jax}
    for example in examples:
        if example.source.startswith("def log_to"):
            exec(example.source, scope)
    module = Mock()
    module.configure_mock(**{f"{log}.return_value": None})
    monkeypatch.setitem(sys.modules, tracker, module)
    state = fit(scope[f"log_to_{tracker}"], epochs=3)
    calls = getattr(module, log).call_args_list
    assert [call.args[0] for call in calls] == list(state.history)
    assert [call.kwargs for call in calls] == [{"step": step} for step in (1, 2, 3)]
