"""Tests that need eight devices: `test_placement.py` runs them in a process that has them."""

import functools
import logging
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxgrad as jg
from jaxgrad._training import session as _session

ROWS, BATCH = 80, 16
RAGGED = 86  # with a last batch of six, which no number of devices here divides


def make(rows=ROWS):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {
        "trunk": {"w": normal(8, 16), "b": normal(16)},
        "head": {"w": normal(16, 3), "b": normal(3)},
    }
    dataset = {"x": normal(rows, 8), "y": normal(rows, 3)}
    return params, dataset


def loss(p, batch):
    h = jnp.tanh(batch["x"] @ p["trunk"]["w"] + p["trunk"]["b"][None])
    return jnp.mean((h @ p["head"]["w"] + p["head"]["b"][None] - batch["y"]) ** 2)


def noisy(p, batch, key):
    return loss(p, batch) + jax.random.normal(key) * p["head"]["b"].sum()


SGD = optax.sgd(0.1, momentum=0.9)
RULES = {"trunk/w": P(None, "data"), "trunk/**": P("data")}


def mesh(devices=8):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def run(loss=loss, dataset=None, tx=SGD, epochs=2, rows=ROWS, **options):
    params, given = make(rows)
    options = {"batch_size": BATCH, "callback_every": 2, "key": jax.random.key(0)} | options
    return jg.fit(loss, params, dataset or given, tx, epochs=epochs, **options)


@functools.cache
def on_one(rows=ROWS):
    return run(rows=rows)


def close(a, b):
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a.params, b.params
    )
    assert jax.tree.structure(a.opt_state) == jax.tree.structure(b.opt_state)


def bits(state):
    leaves = jax.tree.leaves((state.params, state.opt_state, state.losses))
    return [np.asarray(x).tobytes() for x in leaves]


@pytest.mark.parametrize(
    ("devices", "sharding", "rows"),
    [
        (1, "replicated", ROWS),
        (2, "replicated", RAGGED),
        (2, "fsdp", ROWS),
        (8, "replicated", ROWS),
        (8, "fsdp", RAGGED),
        (8, RULES, ROWS),
    ],
)
def test_any_number_of_devices_trains_as_one(devices, sharding, rows):
    close(run(mesh=mesh(devices), sharding=sharding, rows=rows), on_one(rows))


@pytest.mark.parametrize(
    ("sharding", "weight", "bias"),
    [("replicated", P(), P()), ("fsdp", P(None, "data"), P("data"))],
)
def test_optimizer_state_lies_with_its_parameter(sharding, weight, bias):
    tx = jg.param_groups({"trunk/**": optax.chain(optax.scale_by_adam(), optax.scale(0.01))})
    with jax.numpy_dtype_promotion("standard"):
        state = run(tx=tx, mesh=mesh(), sharding=sharding)
    adam = state.opt_state.groups[0][0]
    for tree in (state.params, adam.mu, adam.nu):
        assert tree["trunk"]["w"].sharding.spec == weight
        assert tree["trunk"]["b"].sharding.spec == bias
    assert adam.count.sharding.is_fully_replicated and len(adam.count.devices()) == 8
    assert state.params["head"]["b"].sharding.is_fully_replicated  # three don't divide by eight
    share = state.params["trunk"]["w"].addressable_shards[0].data.size
    assert share == 8 * 16 // (1 if sharding == "replicated" else 8)


def test_one_axis_for_rows_and_one_for_parameters():
    both = Mesh(np.array(jax.devices()).reshape(2, 4), ("model", "data"))
    rules = {"trunk/w": P(None, "model"), "**/b": P(), "**/w": P(("model", "data"))}
    state = run(mesh=both, sharding=rules)
    close(state, on_one())
    assert state.params["trunk"]["w"].sharding.spec == P(None, "model")
    assert state.params["head"]["w"].sharding.spec == P(("model", "data"))


def test_explicit_axes_are_taken_as_automatic():
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    close(run(mesh=explicit, sharding="fsdp"), on_one())
    with (
        jax.set_mesh(explicit),
        pytest.raises(ValueError, match="a mesh with Explicit axes, under which"),
    ):
        run(mesh=explicit)


@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_one_compilation_for_each_size_of_batch(sharding, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        run(mesh=mesh(), sharding=sharding, rows=RAGGED)
    compiled = [r.message for r in caplog.records if r.message.startswith("Compiling jit(run)")]
    assert len(compiled) == 2


class Recorder:
    """An array that counts how often each of its rows is read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.ndim = array.ndim
        self.read = np.zeros(len(array), int)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        np.add.at(self.read, rows, 1)
        return self.array[rows]


def test_each_row_is_read_once_an_epoch_and_no_dataset_is_put_whole():
    _, dataset = make(RAGGED)
    recorded = {name: Recorder(array) for name, array in dataset.items()}
    close(run(dataset=recorded, mesh=mesh(), stage=False, callback_every=1), on_one(RAGGED))
    assert all((r.read == 2).all() for r in recorded.values())


def test_a_file_larger_than_a_call_may_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgrad._training.resident.BYTES_PER_CALL", 2 * 16 * 11 * 4)  # two steps
    _, dataset = make()
    np.save(tmp_path / "x.npy", dataset["x"])
    dataset["x"] = np.load(tmp_path / "x.npy", mmap_mode="r")
    close(run(dataset=dataset, mesh=mesh(1), callback_every=None), on_one())


def test_a_stream_is_split_over_the_devices():
    _, data = make(RAGGED)
    rows = [jax.tree.map(lambda x, i=i: x[i], data) for i in range(RAGGED)]
    batches = grain.MapDataset.source(rows).batch(BATCH)
    state = run(dataset=batches, mesh=mesh(), sharding="fsdp")
    expected = run(dataset=data, key=None)
    np.testing.assert_allclose(state.losses, expected.losses, rtol=1e-5)
    assert state.step == expected.step


def test_a_run_goes_on_to_the_same_bits_and_on_other_devices(tmp_path):
    def killer(state):
        if state.step == 9:
            raise KeyboardInterrupt

    whole = run(noisy, mesh=mesh(), sharding="fsdp")
    with pytest.raises(KeyboardInterrupt):
        run(noisy, mesh=mesh(), sharding="fsdp", checkpoint=tmp_path / "8", callbacks=[killer])
    for devices in (2, 1):
        shutil.copytree(tmp_path / "8", tmp_path / str(devices))
    for devices in (8, 2, 1):
        options = {"mesh": mesh(devices), "sharding": "fsdp"} if devices > 1 else {}
        path = tmp_path / str(devices)
        resumed = run(noisy, checkpoint=path, resume=True, **options)
        assert resumed.resumed == "resumed at step 7"
        close(resumed, whole)
        assert (bits(resumed) == bits(whole)) == (devices == 8)
        assert len(resumed.params["trunk"]["w"].devices()) == devices
        loaded = jg.load(path, into=make()[0])
        jax.tree.map(np.testing.assert_array_equal, loaded, resumed.params)


def test_staged_features_are_split_with_the_rows(monkeypatch):
    monkeypatch.setattr("jaxgrad._staging.report._COMPILATION", 0.0)
    monkeypatch.setattr("jaxgrad._staging.report._STEP", 0.0)
    monkeypatch.setattr("jaxgrad._staging.min_cut.FLOPS_PER_BYTE", 1e-6)
    tx = jg.param_groups({"head/**": SGD})
    state = run(tx=tx, mesh=mesh(), sharding="fsdp")
    assert "the frozen part runs once per row" in state.staging
    close(state, run(tx=tx, stage=False))


def test_a_loss_with_shard_map_is_staged(monkeypatch):
    monkeypatch.setattr("jaxgrad._staging.min_cut.FLOPS_PER_BYTE", 1e-6)
    params, data = make()
    split = jax.shard_map(
        lambda x, p: jnp.tanh(x @ p["w"] + p["b"][None]),
        mesh=mesh(4),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
    )

    def loss(p, batch):
        h = split(batch["x"], p["trunk"])
        return jnp.mean((h @ p["head"]["w"] + p["head"]["b"][None] - batch["y"]) ** 2)

    batch = jax.tree.map(lambda x: x[:BATCH], data)
    staged = jg.stage(loss, params, batch, "head/**")
    assert [c.shape for c in staged.report().crossing if c.computed] == [(16,)]
    assert staged.report().once >= 2 * 8 * 16
    head, _ = jg.partition(params, "head/**")
    features = staged.prepare(data, progress=False)[: BATCH // 2]
    expected = loss(params, jax.tree.map(lambda x: x[: BATCH // 2], data))
    np.testing.assert_allclose(staged.loss(head, features), expected, rtol=1e-6)


@pytest.mark.parametrize("sharding", [None, "fsdp"])
def test_the_steps_are_lowered_for_machines_that_are_not_there(sharding, monkeypatch):
    lowered = []

    def abstract(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if sharding else None)

    def compile_steps(*options):
        steps = _compile(*options)

        def call(*args):
            exported = jax.export.export(steps, platforms=("cpu", "cuda", "tpu"))
            lowered.append(exported(*jax.tree.map(abstract, args)))
            carry = args[0]
            out = steps(*args)
            assert all(x.is_deleted() for x in jax.tree.leaves(carry))  # the buffers are taken over
            return out

        return call

    _compile = _session.compile_steps
    monkeypatch.setattr(_session, "compile_steps", compile_steps)
    run(
        noisy,
        epochs=1,
        rows=RAGGED,
        callback_every=None,
        **({"mesh": mesh(), "sharding": sharding} if sharding else {}),
    )
    assert len(lowered) == 2
    for exported in lowered:
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert exported.nr_devices == (8 if sharding else 1)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"mesh": None},
            ValueError,
            "sharding='fsdp' needs the devices: fit(..., mesh=jax.sharding.Mesh(",
        ),
        (
            {"batch_size": 12},
            ValueError,
            "batch_size=12 can't be split over the 8 devices of the mesh axis 'data'. Choose a "
            "multiple of 8.",
        ),
        (
            {"sharding": "zero"},
            ValueError,
            "sharding='zero'; it must be 'replicated', 'fsdp', or a mapping from patterns",
        ),
        (
            {"sharding": {"haed/**": P()}},
            jg.SelectionError,
            "sharding pattern 'haed/**' matches no leaf. Did you mean 'head'",
        ),
        (
            {"sharding": {"head/**": "data"}},
            ValueError,
            "the sharding rule 'head/**' is 'data'; it must be a jax.sharding.PartitionSpec.",
        ),
        (
            {"sharding": {"head/**": P("data")}},
            ValueError,
            "the sharding rule 'head/**': P('data',) does not fit 'head/b', "
            "float32[3]: an axis of 3 can't be split over 8 devices.",
        ),
        (
            {"sharding": {"head/b": P(None, "data")}},
            ValueError,
            "does not fit 'head/b', float32[3]: it has 2 entries and the leaf has 1 axes.",
        ),
        (
            {"sharding": {"trunk/**": P("model")}},
            ValueError,
            "does not fit 'trunk/b', float32[16]: the mesh has no axis 'model'; it has 'data'.",
        ),
    ],
)
def test_wrong_arguments(change, error, text):
    with pytest.raises(error) as info:
        run(**({"mesh": mesh(), "sharding": "fsdp"} | change))
    assert text in str(info.value)
