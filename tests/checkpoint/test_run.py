import json
import os
import shutil
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad._checkpoint import record
from jaxgrad._disk import safetensors
from jaxgrad.models import MLP
from tests import kills

KEY = jax.random.key(0)
ROWS = 22


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def make():
    apply, params = jg.functional(MLP(6, (5, 4), 3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    dataset = {
        "x": rng.normal(size=(ROWS, 6)).astype(np.float32),
        "y": rng.integers(0, 3, ROWS).astype(np.int32),
    }

    def loss(params, batch, key):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss, params, dataset


TX = jg.param_groups({"head/**": optax.adam(0.1), "layers/1/**": optax.sgd(0.1, momentum=0.9)})


def run(checkpoint=None, *, tx=TX, epochs=3, callbacks=(), **options):
    loss, params, dataset = make()
    options = {"batch_size": 5, "callback_every": 2, "key": KEY} | options
    return jg.fit(
        loss,
        params,
        dataset,
        tx,
        epochs=epochs,
        checkpoint=checkpoint,
        callbacks=callbacks,
        **options,
    )


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def same(a, b):
    """The same run to the bit, but for the time that it took."""
    assert bits(a.params) == bits(b.params)
    assert bits(a.opt_state) == bits(b.opt_state)
    assert a.losses.tobytes() == b.losses.tobytes() and a.step == b.step
    without_time = lambda s: [{k: v for k, v in r.items() if k != "rows_per_s"} for r in s.history]
    assert without_time(a) == without_time(b)


class KillError(Exception):
    pass


def killer(step):
    """A callback that ends a run without giving it a chance to do anything more."""

    def callback(state):
        if state.step >= step:
            raise KillError

    return callback


@pytest.mark.parametrize(
    "step", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 5, 12))]
)
def test_a_run_goes_on_to_the_same_bits(tmp_path, step):
    with pytest.raises(KillError):
        run(tmp_path / "run", callbacks=[killer(step)])
    saved = max(map(int, os.listdir(tmp_path / "run/steps")), default=0)
    assert saved < step
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.resumed == (f"resumed at step {saved}" if saved else "")
    same(resumed, run())
    again = run(tmp_path / "run", resume=True)  # nothing is left to do
    assert again.resumed == "resumed at step 15"
    same(again, resumed)
    same(run(tmp_path / "run", epochs=5, resume=True), run(epochs=5))


def test_what_a_step_costs(tmp_path):
    run(tmp_path / "run", wrt="head/**", tx=jg.param_groups({"head/**": optax.sgd(0.1)}))
    info = jg.inspect(tmp_path / "run")
    assert info.trained == ("head/bias", "head/kernel")
    assert sorted(info.leaves) == jg.paths(make()[1])
    step = jg.inspect(tmp_path / "run/steps/15").leaves
    assert sorted(step) == ["losses", "trained/head/bias", "trained/head/kernel"]
    (frozen,) = (tmp_path / "run/frozen").iterdir()
    assert sorted(jg.inspect(frozen).leaves) == [p for p in jg.paths(make()[1]) if "layers" in p]


def test_the_newest_step_of_a_run_is_loaded_like_any_checkpoint(tmp_path):
    config = jg.Checkpoints(tmp_path / "run", config={"classes": 3})
    state = run(config)
    loaded = jg.load(tmp_path / "run", into=make()[1])
    assert bits(loaded) == bits(state.params)
    assert jg.inspect(tmp_path / "run").config == {"classes": 3}
    blank = jax.tree.map(jnp.zeros_like, loaded)
    part = jg.load(tmp_path / "run", into=blank, wrt="head/**")
    assert bits(part["head"]) == bits(state.params["head"])
    assert not any(x.any() for x in jax.tree.leaves(part["layers"]))


def test_what_is_kept(tmp_path):
    steps = lambda: sorted(map(int, os.listdir(tmp_path / "run/steps")))
    score = lambda state: {"score": -abs(state.step - 4)}
    config = jg.Checkpoints(tmp_path / "run", keep=2, best=2, metric="score", mode="max")
    run(config, callbacks=[score])
    assert steps() == [4, 5, 14, 15]
    shutil.rmtree(tmp_path / "run")
    run(jg.Checkpoints(tmp_path / "run", keep=1, every=100))
    assert steps() == [15]
    run(jg.Checkpoints(tmp_path / "run", keep=1, every=2), epochs=4, resume=True)
    assert steps() == [20]


def test_any_step_that_is_kept_is_loaded(tmp_path):
    states = {}

    def score(state):
        states[state.step] = jax.tree.map(np.asarray, state.params)
        return {"score": -abs(state.step - 4)}

    config = jg.Checkpoints(tmp_path / "run", keep=2, best=2, metric="score", mode="max")
    run(config, callbacks=[score])
    for step in (4, 5, 14, 15):
        assert bits(jg.load(tmp_path / "run", make()[1], step=step)) == bits(states[step])
    assert bits(jg.load(tmp_path / "run", make()[1], step="best")) == bits(states[4])
    assert bits(jg.load(tmp_path / "run")) == bits(states[15])
    head = jg.load(tmp_path / "run", wrt="head/**", step=5)
    assert [*head] == ["head"] and bits(head["head"]) == bits(states[5]["head"])
    with pytest.raises(jg.CheckpointError) as info:
        jg.load(tmp_path / "run", step=7)
    assert str(info.value) == (
        f"step=7: the run in '{tmp_path / 'run'}' has the steps 4, 5, 14, 15. Pass one of them, "
        '"best", or None for the newest.'
    )


def test_the_best_of_a_run_without_the_metric(tmp_path):
    run(jg.Checkpoints(tmp_path / "run", metric="accuracy"), epochs=1)
    with pytest.raises(jg.CheckpointError) as info:
        jg.load(tmp_path / "run", step="best")
    assert str(info.value) == (
        f"step='best': the run in '{tmp_path / 'run'}' has the steps 4, 5, and none has "
        "'accuracy' in the history, which has 'step', 'epoch', 'loss', 'rows_per_s'. Pass one of "
        "these as Checkpoints(metric=...) in the next run, or load a step by its number."
    )


@pytest.mark.parametrize(("attribute", "value"), [("every", 0), ("keep", 0), ("best", -1)])
def test_checkpoints_out_of_range(attribute, value):
    with pytest.raises(ValueError, match=f"{attribute}={value}; it must be"):
        jg.Checkpoints("run", **{attribute: value})
    with pytest.raises(ValueError, match="mode='most'; it must be 'min' or 'max'"):
        jg.Checkpoints("run", mode="most")


# What is trained may change.


@pytest.mark.slow
def test_other_patterns_keep_the_state_that_survives(tmp_path):
    head = jg.param_groups({"head/**": optax.adam(0.1)})
    first = run(tmp_path / "run", tx=head, epochs=1)
    more = jg.param_groups(
        {"layers/1/**": optax.sgd(0.1, momentum=0.9), "head/**": optax.adam(0.1)}
    )
    second = run(tmp_path / "run", tx=more, epochs=2, resume=True)
    assert second.resumed == (
        "resumed at step 5; newly trained: 'layers/1/bias', 'layers/1/kernel'; optimizer "
        "state: 5 arrays kept, 2 added (TraceState.trace), 0 dropped"
    )
    assert bits(second.params["layers"][0]) == bits(first.params["layers"][0])
    assert bits(second.params["layers"][1]) != bits(first.params["layers"][1])
    np.testing.assert_array_equal(second.losses[:5], first.losses)
    third = run(tmp_path / "run", tx=jg.param_groups({"layers/0/**": optax.sgd(0.1)}), resume=True)
    assert (
        "newly trained: 'layers/0/bias', 'layers/0/kernel'; frozen now: 'head/bias'"
        in third.resumed
    )
    for part in ("head", "layers/1"):  # frozen at the value that they had reached
        only = jg.partition(third.params, f"{part}/**")[0]
        assert bits(only) == bits(jg.partition(second.params, f"{part}/**")[0])


def test_surviving_state_is_that_of_the_leaf(tmp_path):
    head = jg.param_groups({"head/**": optax.sgd(0.1, momentum=0.9)})
    first = run(tmp_path / "run", tx=head, epochs=1)
    moved = jg.param_groups(
        {"layers/**": optax.sgd(0.1, momentum=0.9), "head/**": optax.sgd(0.1, momentum=0.9)}
    )
    state = run(tmp_path / "run", tx=moved, epochs=1, resume=True)  # no step is left to take
    of_head = lambda s: [
        x for p, x in zip(jg.paths(s), jax.tree.leaves(s), strict=True) if "head" in p
    ]
    assert bits(of_head(state.opt_state)) == bits(of_head(first.opt_state))
    assert any(x.any() for x in of_head(state.opt_state))


# What can go wrong.


def refused(text, *args, error=jg.CheckpointError, **options):
    with pytest.raises(error) as info:
        run(*args, **options)
    assert text in str(info.value), str(info.value)


def test_directories_that_are_taken(tmp_path):
    run(tmp_path / "run", epochs=1)
    refused("holds a run, of step 5. Continue it with resume=True, or choose", tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    refused("other' does not hold a run. Choose another directory.", tmp_path / "other")
    refused("thesis.tex' is a file.", tmp_path / "other/thesis.tex", resume=True)
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", epochs=1, resume=True).step == 5
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


def test_a_run_that_was_called_otherwise(tmp_path):
    run(tmp_path / "run", epochs=1)
    text = "has batch_size 5, but this call 6: its next step would take other rows."
    refused(text, tmp_path / "run", batch_size=6, resume=True)
    refused("has key", tmp_path / "run", key=jax.random.key(1), resume=True)
    _, _, dataset = make()
    with pytest.raises(jg.CheckpointError, match=r"it has 'head/bias', which the tree does not"):
        jg.fit(
            lambda p, b, key: p["w"],
            {"w": jnp.ones(())},
            dataset,
            optax.sgd(0.1),
            batch_size=5,
            key=KEY,
            checkpoint=tmp_path / "run",
            resume=True,
        )


def damage(step: Path, how: str):
    file = step / "arrays.safetensors"
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    if how == "lost":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        spot = content.index(b"rows_per_s") if how == "record" else 8 + header + 5
        content[spot] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("lost", "is not an Orbax checkpoint"),
        ("cut", "arrays.safetensors: "),
        ("record", "the checksum of its record is wrong"),
        ("flipped", "the checksum of 'losses' is wrong"),
    ],
)
def test_a_damaged_step_is_passed_over(tmp_path, how, why):
    with pytest.raises(KillError):
        run(tmp_path / "run", callbacks=[killer(11)])
    newest, before = sorted(map(int, os.listdir(tmp_path / "run/steps")))[:-3:-1]
    damage(tmp_path / "run/steps" / str(newest), how)
    with pytest.warns(UserWarning, match=f"step {newest} of .* is damaged and passed over.*{why}"):
        resumed = run(tmp_path / "run", resume=True)
    assert resumed.resumed == f"resumed at step {before}"
    same(resumed, run())


def test_a_damaged_step_is_not_deleted(tmp_path):
    steps = lambda: sorted(map(int, os.listdir(tmp_path / "run/steps")))
    run(tmp_path / "run", epochs=1)
    damage(tmp_path / "run/steps/5", "cut")
    with pytest.warns(UserWarning, match="step 5 of .* is damaged"), pytest.raises(KillError):
        run(tmp_path / "run", resume=True, callbacks=[killer(5)])
    assert steps() == [4, 5]
    config = jg.Checkpoints(tmp_path / "run", keep=1, every=2)  # the next save is at step 7
    with pytest.warns(UserWarning, match="step 5 of .* is damaged"):
        run(config, resume=True)
    assert steps() == [5, 15]


def test_damaged_frozen_parameters_are_stored_again(tmp_path):
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    run(tmp_path / "run", tx=tx, epochs=1)
    (frozen,) = (tmp_path / "run/frozen").iterdir()
    damage(frozen, "flipped")
    with pytest.warns(UserWarning, match=r"step [45] of .* the checksum of 'layers/0/bias'"):
        again = run(tmp_path / "run", tx=tx, epochs=1, resume=True)
    assert again.resumed == ""
    assert run(tmp_path / "run", tx=tx, epochs=1, resume=True).resumed == "resumed at step 5"


def test_a_step_of_another_format_version_is_an_error_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "VERSION", record.VERSION + 1)
    run(tmp_path / "run", epochs=1)
    monkeypatch.undo()
    steps = sorted(os.listdir(tmp_path / "run/steps"))
    refused("steps/5' has format version 3, and this jaxgrad", tmp_path / "run", resume=True)
    assert sorted(os.listdir(tmp_path / "run/steps")) == steps == ["4", "5"]


# Orbax leaves a coroutine behind where it fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flipped", "lost"])
def test_what_one_file_cannot_hold_is_orbaxs(tmp_path, how):
    """As the steps of several processes are, which one does not hold."""

    def train(epochs=3, **options):
        loss = lambda p, b: ((b @ p["head"]) * p["scale"].astype(jnp.float32).sum()).sum()
        params = {"head": jnp.ones(3), "scale": jnp.array([1, 2, -3], jnp.int4)}
        rows = np.ones((6, 3), np.float32)
        tx = jg.param_groups({"head": optax.sgd(0.1)})
        state = optax.tree_utils.tree_zeros_like({"count": jnp.zeros(2, jnp.int4)})
        keep = optax.GradientTransformation(lambda p: state, lambda g, s, p=None: (g, s))
        return jg.fit(
            loss,
            params,
            rows,
            optax.chain(tx, keep),
            epochs=epochs,
            batch_size=3,
            **options,
            wrt="head",
        )

    first = train(epochs=2, checkpoint=tmp_path / "run")
    steps = tmp_path / "run/steps"
    assert sorted(os.listdir(steps)) == ["2", "4"]
    assert (steps / "4/_CHECKPOINT_METADATA").exists()
    assert bits(jg.load(tmp_path / "run", into=first.params)) == bits(first.params)
    for data in (steps / "4").glob("state/**/d/*"):
        content = bytearray(data.read_bytes())
        data.unlink()
        if how == "flipped":
            content[:: len(content) // 8] = bytes(255 - x for x in content[:: len(content) // 8])
            data.write_bytes(content)
    with pytest.warns(UserWarning, match="step 4 of .* is damaged and passed over"):
        resumed = train(checkpoint=tmp_path / "run", resume=True)
    assert resumed.resumed == "resumed at step 2"
    same(resumed, train())


def test_what_kills_leave_is_cleared_away(tmp_path):
    with pytest.raises(KillError):
        run(tmp_path / "run", callbacks=[killer(9)])
    steps = tmp_path / "run/steps"
    newest = max(map(int, os.listdir(steps)))
    shutil.copytree(steps / str(newest), steps / "9.tmp")
    shutil.copytree(steps / str(newest), steps / "11.orbax-checkpoint-tmp-1")
    shutil.copytree(steps / str(newest), steps / "1.gone")
    same(run(tmp_path / "run", resume=True), run())
    assert sorted(os.listdir(steps)) == ["14", "15"]


def test_a_save_that_fails_says_what_is_left(tmp_path, monkeypatch):
    write, calls = safetensors.write, []

    def full(file, *args):
        calls.append(file)
        if len(calls) > 3:
            file.write(b"the first bytes")
            raise OSError(28, "No space left on device", file.name)
        return write(file, *args)

    monkeypatch.setattr("jaxgrad._disk.safetensors.write", full)
    refused("could not be saved in", tmp_path / "run")
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "run/steps")) == ["2", "4"]
    same(run(tmp_path / "run", resume=True), run())


def test_a_loss_that_is_no_number_leaves_the_last_good_state(tmp_path):
    loss, params, dataset = make()
    dataset["x"][17] = np.nan
    with pytest.raises(jg.NonFiniteLossError) as info:
        jg.fit(loss, params, dataset, TX, batch_size=5, key=KEY, checkpoint=tmp_path / "run")
    state = info.value.state
    assert bits(jg.load(tmp_path / "run", into=params)) == bits(state.params)
    assert np.isfinite(state.losses).all() and len(state.losses) == state.step


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_can_go_on(tmp_path, number, capfd):
    before = signal.getsignal(number)

    def callback(state):
        if state.step == 5:
            signal.raise_signal(number)

    with pytest.raises(jg.Interrupted) as info:
        run(tmp_path / "run", callbacks=[callback])
    assert str(info.value) == (
        f"{number.name} ended the run at step 5. It is saved in '{tmp_path / 'run'}': continue it "
        "with resume=True."
    )
    assert info.value.state.step == 5 and info.value.signal == number
    assert f"{number.name}: finishing the step and saving; again to leave" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    same(run(tmp_path / "run", resume=True), run())


def test_a_signal_in_the_midst_of_a_chunk(tmp_path, monkeypatch):
    """The calls are shorter than the chunk, and the record of the chunk is whole all the same."""
    monkeypatch.setattr("jaxgrad._training.session._CALL", 2)
    expected = run(callback_every=5)
    monkeypatch.setattr("jaxgrad._training.fit.caught_signals", lambda active: _AfterCalls(4))
    with pytest.raises(jg.Interrupted, match="at step 7"):
        run(tmp_path / "run", callback_every=5)
    monkeypatch.undo()
    same(run(tmp_path / "run", callback_every=5, resume=True), expected)
    assert [r["step"] for r in expected.history] == [5, 10, 15]


class _AfterCalls(list):
    """A list of signals that is empty until so many calls have been looked after."""

    def __init__(self, calls):
        self.looks = 0
        self.calls = calls

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __bool__(self):
        self.looks += 1
        if self.looks == self.calls:
            self[:] = [signal.SIGTERM]
        return len(self) > 0


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    states = []
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    thread = threading.Thread(target=lambda: states.append(run(tmp_path / "run", tx=tx, epochs=1)))
    thread.start()
    thread.join()
    assert states[0].step == 5 and signal.getsignal(signal.SIGINT) is before


def test_a_step_is_a_file_that_others_read(tmp_path):
    from safetensors.numpy import load_file

    state = run(tmp_path / "run", epochs=1)
    file = tmp_path / "run/steps/5/arrays.safetensors"
    assert load_file(file)["trained/head/bias"].tobytes() == bits(state.params["head"]["bias"])[0]
    text = json.loads(jg.torch.read(file).values["record"])
    assert [entry["step"] for entry in json.loads(text["history"])] == [2, 4, 5]


@pytest.mark.slow
def test_kills(tmp_path):
    """The short form of `python -m tests.kills`."""
    moments = kills.kill_again_and_again(tmp_path / "killed", epochs=1000, kills=4, seed=0)
    assert moments["kills"] == 4 and moments["steps saved"] > 0
    digests = {kills.finished(tmp_path / name, epochs=1000) for name in ("killed", "left")}
    assert len(digests) == 1
