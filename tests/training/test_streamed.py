"""Batches from Grain and from other iterators are trained on as arrays are."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad._devices.processes import of_all
from jaxgrad._training import streamed as _streamed
from jaxgrad._training.job import is_stream

ROWS, BATCH, EPOCHS = 22, 4, 3
DRAW = np.random.default_rng(0)
DATA = {
    "x": DRAW.normal(size=(ROWS, 3)).astype(np.float32),
    "y": DRAW.normal(size=(ROWS, 2)).astype(np.float32),
}
PARAMS = {"w": jnp.zeros((3, 2))}
SGD = optax.sgd(0.1, momentum=0.9)


class Rows:
    """A source of examples, as Grain reads them."""

    def __repr__(self):  # by which a Grain loader knows its source again
        return "Rows()"

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return {name: x[i] for name, x in DATA.items()}


def dataset():
    return grain.MapDataset.source(Rows()).shuffle(seed=1).batch(BATCH)


def loader():
    sampler = grain.samplers.IndexSampler(ROWS, shuffle=True, seed=1, num_epochs=1)
    return grain.DataLoader(
        data_source=Rows(), sampler=sampler, operations=[grain.transforms.Batch(BATCH)]
    )


SOURCES = {
    "MapDataset": dataset,
    "IterDataset": lambda: dataset().to_iter_dataset(),
    "DataLoader": loader,
}


def loss(params, batch, key):
    noise = jax.random.normal(key, batch["y"].shape) / 10
    return jnp.mean((batch["x"] @ params["w"] + noise - batch["y"]) ** 2)


def fit(dataset, **options):
    options = {
        "epochs": EPOCHS,
        "callback_every": 4,
        "key": jax.random.key(0),
        "progress": False,
    } | options
    return jg.fit(loss, PARAMS, dataset, SGD, **options)


def bits(state):
    leaves = jax.tree.leaves((state.params, state.opt_state, state.losses))
    return [np.asarray(x).tobytes() for x in leaves]


@pytest.mark.parametrize("name", SOURCES)
def test_a_stream_trains_as_its_rows_do(name):
    batches = list(SOURCES[name]())
    orders = {k: np.concatenate([b[k] for b in batches]) for k in DATA}
    streamed = fit(SOURCES[name]())
    # In their order: the noise of a step then has the same key, and there is no other shuffling.
    steps = [jax.tree.map(lambda x, i=i: x[i : i + BATCH], orders) for i in range(0, ROWS, BATCH)]
    params, state, losses = PARAMS, SGD.init(PARAMS), []
    for step, batch in enumerate(steps * EPOCHS):
        key = jax.random.fold_in(jax.random.key(0), step)
        value, grads = jax.value_and_grad(loss)(params, batch, key)
        updates, state = SGD.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    np.testing.assert_allclose(streamed.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(streamed.params["w"], params["w"], rtol=1e-5)
    assert [(r["step"], r["epoch"]) for r in streamed.history] == [
        *[(4, 0), (6, 0), (10, 1), (12, 1), (16, 2), (18, 2)]
    ]
    assert streamed.staging == "nothing is staged"


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("step", [4, 6, 10])
def test_a_run_goes_on_with_the_batch_that_would_have_been_next(name, step, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgrad._training.session._CALL", 3)  # saves of a call, and of a chunk
    uninterrupted = fit(SOURCES[name]())

    def stop(state):
        if state.step == step:
            raise jg.StopTraining

    assert fit(SOURCES[name](), checkpoint=tmp_path, callbacks=[stop]).step == step
    resumed = fit(SOURCES[name](), checkpoint=tmp_path, resume=True)
    assert resumed.resumed == f"resumed at step {step}"
    assert bits(resumed) == bits(uninterrupted)


def test_a_batch_that_failed_comes_again(tmp_path):
    broken = {"now": True}

    class Source(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "x": row["x"] * np.nan} if i == 9 and broken["now"] else row

    def make():
        return grain.MapDataset.source(Source()).batch(BATCH)

    with pytest.raises(jg.NonFiniteLossError, match="rows 8, 9, 10, 11 of the dataset"):
        fit(make(), callback_every=None, checkpoint=tmp_path)
    broken["now"] = False
    assert (
        bits(fit(make(), callback_every=None, checkpoint=tmp_path, resume=True))[:2]
        == bits(fit(make(), callback_every=None))[:2]
    )


def test_a_short_batch_is_compiled_once(caplog):
    with jax.log_compiles():
        fit(dataset(), epochs=4, callback_every=None)
    compiled = [r for r in caplog.records if r.getMessage().startswith("Compiling jit(run)")]
    assert len(compiled) == 2  # whole batches, and the last one of two rows


def test_calls_hold_what_fits(monkeypatch):
    monkeypatch.setattr(_streamed, "BYTES_PER_CALL", 2 * BATCH * 5 * 4)
    calls = []
    inner = _streamed._calls
    monkeypatch.setattr(
        _streamed,
        "_calls",
        lambda *args: (calls.append(made[0].steps) or made for made in inner(*args)),
    )
    fit(dataset(), epochs=1, callback_every=None)
    assert calls == [2, 2, 1, 1]


class Once:
    """No array and no tree: what a PyTorch DataLoader is to JAX."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_anything_that_yields_batches():
    batches = list(dataset())
    assert bits(fit(Once(batches))) == bits(fit(dataset()))
    assert bits(fit((b for b in batches), epochs=1)) == bits(fit(dataset(), epochs=1))


def test_what_is_used_up_lasts_one_epoch():
    with pytest.raises(ValueError, match=r"the generator yields no batch in epoch 2\. An iterator"):
        fit(b for b in dataset())


def test_a_stream_without_a_state_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="of a Once can't report its position"):
        fit(Once(list(dataset())), checkpoint=tmp_path / "run")


def test_arrays_are_no_stream():
    assert not any(map(is_stream, (DATA, [1, 2], np.ones(3), jnp.ones(3), (), None)))
    assert all(map(is_stream, (dataset(), loader(), iter([1]))))


def test_states_of_bytes_are_kept_in_json():
    state = b"\x00\xff{}"
    assert of_all(_streamed._encoded(state)) == [_streamed._encoded(state)]
    assert _streamed._decoded(_streamed._encoded(state)) == state
    assert _streamed._decoded({"next_index": 3}) == {"next_index": 3}
