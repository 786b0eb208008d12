"""`early_stopping(restore_best=True)`: `fit` returns the best parameters, resumed or not."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad.callbacks import early_stopping

X = jnp.linspace(-1.0, 1.0, 16)
DATA = {"x": X, "y": 3 * X}
START = {"w": jnp.array(0.0), "frozen": jnp.arange(2.0), "bias": jnp.array(0.5)}
VALUES = [5.0, 4.0, 1.0, 4.5, 1.0, 4.0, 4.0, 4.0]


def loss(p, batch):
    return jnp.mean((p["w"] * batch["x"] + p["bias"] - batch["y"]) ** 2)


def scored(values=VALUES, seen=None):
    """A callback that adds one value after another, and writes down the parameters."""

    def callback(state):
        if seen is not None:
            seen[state.step] = jax.tree.map(np.asarray, state.params)
        return {"val": values[len(state.history) - 1]}

    return callback


def fit(*callbacks, epochs=8, wrt="w", **options):
    tx = optax.sgd(0.05, momentum=0.9)
    return jg.fit(loss, START, DATA, tx, wrt=wrt, epochs=epochs, callbacks=callbacks, **options)


def best(patience=9, **options):
    return early_stopping("val", patience=patience, restore_best=True, **options)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stop_at(step):
    def callback(state):
        if state.step == step:
            raise jg.StopTraining

    return callback


@pytest.mark.parametrize(
    ("values", "mode", "step"),
    [
        (VALUES, "min", 3),  # the first of two
        (VALUES, "max", 1),
        ([3, 2, 1, 0], "min", 4),
        ([float("nan"), 2, float("nan"), 3], "min", 2),
        ([float("nan")] * 4, "min", 4),  # there is no best: the last
    ],
)
def test_the_parameters_are_those_of_the_best_chunk(values, mode, step):
    seen = {}
    state = fit(scored(values, seen), best(mode=mode), epochs=len(values))
    same(state.params, seen[step])
    assert state.step == len(values) == len(state.history)
    assert state.params["frozen"] is START["frozen"]
    assert float(state.params["w"]) != 0.0


def test_however_the_run_ends():
    seen = {}
    ends = {
        "patience": [scored(seen=seen), best(patience=1)],
        "epochs": [scored(), best()],
        "another callback": [scored(), best(), stop_at(6)],
        "before it is called": [scored(), stop_at(3), best()],
    }
    states = {name: fit(*callbacks) for name, callbacks in ends.items()}
    for state in states.values():
        same(state.params, seen[3])
    assert [state.step for state in states.values()] == [5, 8, 6, 3]
    assert states["patience"].losses.shape == (5,)


@pytest.mark.parametrize("end", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_returns_what_an_unbroken_one_does(end, every, tmp_path):
    seen = {}
    options = {"batch_size": 8, "key": jax.random.key(0)}
    want = fit(scored(seen=seen), best(), **options)
    same(want.params, seen[6])
    run = jg.Checkpoints(tmp_path / "run", every=every, keep=1)
    fit(scored(), best(), stop_at(2 * end), checkpoint=run, **options)
    state = fit(scored(), best(), checkpoint=run, resume=True, **options)
    same(state.params, want.params)
    np.testing.assert_array_equal(state.losses, want.losses)
    same(jg.load(tmp_path / "run", into=START, step="best"), want.params)
    assert sorted(int(p.name) for p in (tmp_path / "run/steps").iterdir()) == [6, 16]
    done = fit(scored(), best(), checkpoint=run, resume=True, **options)  # nothing is left to do
    same(done.params, want.params)


def test_a_resumed_run_that_trains_other_leaves_has_all_of_the_best_step(tmp_path):
    seen, run = {}, tmp_path / "run"
    fit(scored(seen=seen), best(), stop_at(4), checkpoint=run)
    state = fit(scored(), best(), checkpoint=run, resume=True, wrt="bias")
    same(state.params, seen[3])
    assert state.params["bias"] == 0.5


def test_a_run_on_a_mesh(tmp_path):
    seen, run = {}, tmp_path / "run"
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    fit(scored(seen=seen), best(), stop_at(4), checkpoint=run, mesh=mesh)
    state = fit(scored(), best(), checkpoint=run, resume=True, mesh=mesh)
    same(state.params, seen[3])
    assert state.params["w"].sharding == state.params["frozen"].sharding


def test_a_best_step_that_was_not_kept_is_an_error(tmp_path):
    run = jg.Checkpoints(tmp_path / "run", keep=2)
    fit(scored(), stop_at(6), checkpoint=run)
    with pytest.raises(jg.CheckpointError) as e:
        fit(scored(), best(), checkpoint=run, resume=True)
    assert str(e.value) == (
        "early_stopping(restore_best=True) returns the parameters of step 3, the best by 'val', "
        f"and the run does not have them: '{tmp_path}/run' does not hold this step, but 5, 6. "
        "Resume without restore_best, or start a new run with it, which keeps its best step."
    )
    assert fit(scored(), checkpoint=run, resume=True).step == 8


def test_a_damaged_best_step_is_an_error(tmp_path):
    run = tmp_path / "run"
    fit(scored(), best(), stop_at(6), checkpoint=run)
    shutil.rmtree(run / "steps/3")
    (run / "steps/3").mkdir()
    with pytest.raises(jg.CheckpointError, match=r"parameters of step 3, .* Resume without"):
        fit(scored(), best(), checkpoint=run, resume=True)
    assert (run / "steps/3").is_dir()


def test_one_run_has_one_best(tmp_path):
    by_loss = jg.Checkpoints(tmp_path / "run", best=1)
    with pytest.raises(
        ValueError, match=r"Checkpoints\(best=1\) keeps the best by 'loss', 'min', and .* 'val', 'm"
    ):
        fit(scored(), best(), checkpoint=by_loss)
    assert not (tmp_path / "run").exists()
    other = early_stopping("loss", patience=1, restore_best=True)
    with pytest.raises(ValueError, match=r"the best by 'val', 'min'; by 'loss', 'min'\. Pass re"):
        fit(scored(), best(), other)
    fit(scored(), best(), best(patience=2), epochs=1)  # both ask for the same
