import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxgrad as jg
from jaxgrad._staging import min_cut
from tests.losses import CASES, ROWS


@pytest.fixture(autouse=True)
def _storing_is_cheap(monkeypatch):
    """The models here are so small that storing anything would cost more than computing it."""
    monkeypatch.setattr(min_cut, "FLOPS_PER_BYTE", 1e-6)


def batch_of(data, rows):
    return jax.tree.map(lambda a: a[rows], data)


def close(a, b, tolerance):
    a, b = (jax.tree.leaves(x) for x in (a, b))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def scalar(loss):
    """The loss alone, where it has auxiliary outputs."""

    def first(*args):
        out = loss(*args)
        return out[0] if isinstance(out, tuple) else out

    return first


def cases():
    """Every loss in both precisions; the Transformers on demand, as each takes a dozen seconds."""
    for name in CASES:
        for x64, tolerance in ((False, 1e-5), (True, 1e-12)):
            slow = "ViT" in name
            yield pytest.param(
                name,
                x64,
                tolerance,
                marks=[pytest.mark.slow] * slow,
                id=f"{name}, {'float64' if x64 else 'float32'}",
            )


@pytest.mark.parametrize(("name", "x64", "tolerance"), list(cases()))
def test_staged_equals_unstaged(name, x64, tolerance):
    # Flax itself mixes dtypes: float32 statistics in a float64 model.
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        loss, params, data, wrt = CASES[name]()
        staged = jg.stage(loss, params, batch_of(data, slice(6)), wrt)
        assert staged.report().staged, staged
        features = staged.prepare(data)
        trainable, frozen = jg.partition(params, wrt)

        def unstaged(trainable, batch):
            return loss(jg.merge(trainable, frozen), batch)

        steps = [
            jax.jit(jax.value_and_grad(scalar(staged.loss))),
            jax.jit(jax.value_and_grad(scalar(unstaged))),
        ]
        order = np.random.default_rng(0).permutation(ROWS)
        ours = theirs = trainable
        for rows in np.split(order, range(6, ROWS, 6)):  # the last batch is short
            value, grads = steps[0](ours, features[rows])
            expected, expected_grads = steps[1](theirs, batch_of(data, rows))
            close((value, grads), (expected, expected_grads), tolerance)
            assert max(jnp.abs(g).max() for g in jax.tree.leaves(grads)) > 0
            ours, theirs = (
                jax.tree.map(lambda p, g: p - 0.1 * g, p, g)
                for p, g in ((ours, grads), (theirs, expected_grads))
            )
        close(ours, theirs, tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ViT, head", marks=pytest.mark.slow),
        "auxiliary outputs",
        "folded weights",
    ],
)
def test_a_batch_of_one(name):
    with jax.numpy_dtype_promotion("standard"):
        loss, params, data, wrt = CASES[name]()
        staged = jg.stage(loss, params, batch_of(data, slice(6)), wrt)
        features = staged.prepare(data)
        trainable, _ = jg.partition(params, wrt)
        close(
            jax.jit(staged.loss)(trainable, features[3:4]),
            loss(params, batch_of(data, slice(3, 4))),
            1e-5,
        )


def test_a_dataset_smaller_than_the_batch():
    loss, params, data, wrt = CASES["MLP, head"]()
    staged = jg.stage(loss, params, data, wrt)
    few = batch_of(data, slice(3))
    head, _ = jg.partition(params, wrt)
    close(staged.loss(head, staged.prepare(few)), loss(params, few), 1e-6)


def test_staged_under_jit_scan_and_vmap():
    loss, params, data, wrt = CASES["MLP, frozen above trained"]()
    staged = jg.stage(loss, params, batch_of(data, slice(5)), wrt)
    features = staged.prepare(data)
    trainable, frozen = jg.partition(params, wrt)
    order = jnp.arange(10).reshape(2, 5)

    @jax.jit
    def epoch(staged, features, trainable):
        def step(p, rows):
            value, grads = jax.value_and_grad(staged.loss)(p, features[rows])
            return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads), value

        return jax.lax.scan(step, trainable, order)[1]

    expected = []
    for rows in order:
        value, grads = jax.value_and_grad(
            lambda p, rows=rows: loss(jg.merge(p, frozen), batch_of(data, rows))
        )(trainable)
        trainable = jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)
        expected.append(value)
    start, _ = jg.partition(params, wrt)
    close(epoch(staged, features, start), jnp.stack(expected), 1e-5)
    # A Staged is a pytree: as an argument, frozen weights are not compiled into the program.
    assert {x.shape for x in jax.tree.leaves(staged)} >= {(6, 3)}
    values = jax.vmap(lambda rows: staged.loss(start, features[rows]))(order)
    close(values[0], expected[0], 1e-5)


def noisy(params, batch, key):
    h = jnp.sin(batch["x"] @ params["a"])
    h = h * jax.random.bernoulli(key, 0.5, h.shape).astype(h.dtype)
    h = jnp.tanh(h @ params["b"])
    return jnp.mean((h @ params["c"]) ** 2)


def noisy_params():
    return {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 7)) / 9, "c": jnp.ones((7, 2))}


def test_random_operations_are_not_staged():
    data, params, key = {"x": jnp.linspace(0, 1, 40).reshape(8, 5)}, noisy_params(), jax.random.key
    staged = jg.stage(noisy, params, batch_of(data, slice(4)), "c", vary=(key(0),))
    (crossing,) = staged.report().crossing
    assert crossing.shape == (6,) and crossing.source.startswith("from sin at")
    where, blocked = staged.report().random or ("", 0)
    assert "random_bits at" in where and "test_stage.py" in where
    assert blocked >= 2 * 6 * 7
    assert "in inference mode" in str(staged) and "is drawn anew in each step" in str(staged)
    head, _ = jg.partition(params, "c")
    features = staged.prepare(data)
    values = [staged.loss(head, features[:5], key(i)) for i in range(2)]
    expected = [noisy(params, batch_of(data, slice(5)), key(i)) for i in range(2)]
    close(values, expected, 1e-6)
    assert values[0] != values[1]
    with pytest.raises(jg.StageError, match=r"staged with vary=.* and is called with"):
        staged.loss(head, features[:5])


def stage_batch_norm(train):
    def loss(params, batch):
        h = jnp.sin(batch @ params["a"])
        if train:
            h = (h - h.mean(0, keepdims=True)) / h.std(0, keepdims=True)
        return jnp.mean(jnp.tanh(h @ params["b"]) @ params["c"])

    x = jax.random.normal(jax.random.key(0), (12, 5))
    return loss, x, jg.stage(loss, noisy_params(), x[:6], "c")


def test_what_mixes_examples_is_refused_and_all_before_it_staged():
    loss, x, staged = stage_batch_norm(train=True)
    assert [c.source.split(" at ")[0] for c in staged.report().crossing] == ["from sin"]
    (first, blocked) = staged.report().refusals[0]
    line = stage_batch_norm.__code__.co_firstlineno + 4
    assert first.reason == "reduces over the examples"
    assert f"test_stage.py:{line}:" in first.source
    assert blocked > 2 * 6 * 7
    assert f"not staged: {first}" in str(staged)
    assert not stage_batch_norm(train=False)[2].report().refusals
    head, _ = jg.partition(noisy_params(), "c")
    close(staged.loss(head, staged.prepare(x)[:7]), loss(noisy_params(), x[:7]), 1e-5)


def test_flax_batch_norm_in_training_mode_is_refused():
    from flax import nnx

    norm = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    apply, stats_params = jg.functional(norm)

    def loss(params, batch):
        h, _ = apply.train(params["norm"], batch)
        return jnp.mean(h @ params["head"])

    params = {"norm": stats_params, "head": jnp.ones((5, 1))}
    with jax.numpy_dtype_promotion("standard"):
        staged = jg.stage(loss, params, jnp.ones((4, 5)), "head")
    assert any(r.reason == "reduces over the examples" for r, _ in staged.report().refusals)


def test_side_effects_stay_in_the_step():
    seen = []

    def loss(params, batch):
        h = jnp.sin(batch @ params["a"])
        jax.debug.callback(lambda h: seen.append(h.shape), h)
        return jnp.mean(h @ params["b"] @ params["c"])

    x = jnp.ones((8, 5))
    staged = jg.stage(loss, noisy_params(), x[:4], "c")
    features = staged.prepare(x)
    jax.effects_barrier()
    assert not seen
    head, _ = jg.partition(noisy_params(), "c")
    jax.jit(staged.loss)(head, features[:3])
    jax.effects_barrier()
    assert seen == [(3, 6)]
    assert any("side effect" in r.reason for r, _ in staged.report().refusals)


@pytest.mark.parametrize(
    "among",
    [
        lambda h: h[jnp.nonzero(h[:, 0] > 0)[0]],
        lambda h: h[h[:, 0] > 0],
        lambda h: h[: int(h.sum())],
        lambda h: h if h.sum() > 0 else 2 * h,
        lambda h: h[: len(np.unique(h))],
    ],
    ids=["nonzero", "mask", "slice", "branch", "numpy"],
)
def test_shapes_and_branches_that_depend_on_values_are_refused(among):
    def loss(params, batch):
        return jnp.mean(among(jnp.sin(batch @ params["a"])))

    where = rf"test_stage.py:{among.__code__.co_firstlineno} \(<lambda>\) a shape or a branch"
    with pytest.raises(jg.StageError, match=where):
        jg.stage(loss, noisy_params(), jnp.ones((4, 5)), "b")


def over_devices(trunk, weights):
    """A loss whose trunk runs under `shard_map`, the examples split."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = {"in_specs": (P("data"), weights), "out_specs": P("data")}

    def loss(params, batch):
        h = jax.shard_map(trunk, mesh=mesh, **specs)(batch["x"], params["trunk"])
        return jnp.mean((h @ params["head"] - batch["y"]) ** 2)

    params = {"trunk": jnp.linspace(-1, 1, 20).reshape(5, 4), "head": jnp.ones((4, 1))}
    data = {"x": jnp.linspace(0, 1, 60).reshape(12, 5), "y": jnp.ones((12, 1))}
    return loss, params, data, jg.stage(loss, params, batch_of(data, slice(6)), "head")


def test_shard_map_is_staged():
    loss, params, data, staged = over_devices(lambda x, w: jnp.tanh(x @ w), P())
    assert [c.shape for c in staged.report().crossing if c.computed] == [(4,)]
    features, (head, _) = staged.prepare(data), jg.partition(params, "head")
    close(staged.loss(head, features[3:9]), loss(params, batch_of(data, slice(3, 9))), 1e-6)


@pytest.mark.parametrize(
    ("trunk", "weights", "reason"),
    [
        (lambda x, w: x @ w - jax.lax.pmean(x @ w, "data"), P(), "depends on the devices that"),
        (lambda x, w: x @ w + jax.lax.axis_index("data"), P(), "depends on the devices that"),
        (
            lambda x, w: x @ w,
            P(None, "data"),
            "has different parameters on the devices",
        ),
    ],
    ids=["collective", "axis_index", "split weights"],
)
def test_what_depends_on_the_device_is_refused(trunk, weights, reason):
    with jax.numpy_dtype_promotion("standard"):
        staged = over_devices(trunk, weights)[-1]
    assert not staged.report().staged
    assert any(reason in r.reason for r, _ in staged.report().refusals), str(staged)


def test_nothing_to_stage():
    def loss(params, batch):
        return jnp.mean((batch @ params) ** 2)

    staged = jg.stage(loss, jnp.ones(5), jnp.ones((4, 5)), "**")
    assert not staged.report().staged
    assert str(staged).startswith("Staged: nothing to stage: a step takes")
    assert staged.report().gain(10_000, epochs=100) < 1
    x = jnp.linspace(0, 1, 40).reshape(8, 5)
    close(staged.loss(jnp.ones(5), staged.prepare(x)[2:5]), loss(jnp.ones(5), x[2:5]), 1e-6)


def test_a_loss_that_fails_at_other_sizes_is_not_staged():
    def loss(params, batch):
        return jnp.mean(jnp.sin(batch @ params["a"]) @ params["b"] * jnp.ones((4, 7)))

    staged = jg.stage(loss, noisy_params(), jnp.ones((4, 5)), "b")
    assert not staged.report().staged
    assert "can't be compared with a trace at 8 rows: " in str(staged)


def test_a_loss_that_is_another_at_some_size():
    def loss(params, batch):
        h = jnp.sin(batch @ params["a"])
        return jnp.mean((h if len(batch) > 3 else 2 * h) @ params["b"])

    x = jnp.ones((8, 5))
    staged = jg.stage(loss, noisy_params(), x[:4], "b")
    trained, _ = jg.partition(noisy_params(), "b")
    with pytest.raises(jg.StageError, match="of 4 rows, and for 3 rows it computes something else"):
        staged.loss(trained, staged.prepare(x)[:3])


def test_constants_are_folded_once():
    """Merged weights above a trained layer: the product is made once, and the step has it."""

    def loss(params, batch):
        h = jnp.sin(jnp.sin(batch @ params["a"]) @ params["b"])
        return jnp.mean(h @ (params["c"] @ params["d"]))

    params = {**noisy_params(), "d": jnp.ones((2, 3))}
    x = jnp.linspace(0, 1, 40).reshape(8, 5)
    staged = jg.stage(loss, params, x[:4], "b")
    assert staged.report().constants == 7 * 3 * 4
    assert "constants: 84 bytes from frozen parameters alone" in str(staged)
    assert [c.shape for c in staged.constants] == [(7, 3)]
    trained, _ = jg.partition(params, "b")
    close(staged.loss(trained, staged.prepare(x)), loss(params, x), 1e-6)


def test_predictions(monkeypatch):
    monkeypatch.setattr(min_cut, "FLOPS_PER_BYTE", 10)

    def loss(params, batch):
        h = jax.nn.relu(jax.nn.relu(batch @ params["a"]) @ params["b"])
        return jnp.mean((h @ params["c"]) ** 2)

    shapes = {"a": (784, 512), "b": (512, 512), "c": (512, 10)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    report = jg.stage(loss, params, jnp.zeros((256, 784)), "c").report()
    head = 2 * 512 * 10
    assert report.once == 2 * (784 * 512 + 512 * 512) + 2 * 512
    assert 2 * head <= report.step <= 2 * head + 100
    assert report.nbytes == 4 * 512
    assert report.speedup > 10
    assert report.gain(60_000, 1) < 1 < report.gain(60_000, 3) < report.gain(60_000, 30)
    assert report.gain(100, 1) < 1


def test_errors_are_for_people():
    loss, params, data, wrt = CASES["MLP, head"]()
    batch = batch_of(data, slice(6))
    for pattern, answer in (
        ("c/bb", r"Did you mean 'c/b'\? The tree's"),
        ("d/**", "leaf. The tree's"),
    ):
        with pytest.raises(jg.SelectionError, match=f"{answer} paths: 'a/b', 'a/w', 'b/b'"):
            jg.stage(loss, params, batch, pattern)
    with pytest.raises(jg.RowsError, match="'x' has 10 and 'y' has 6"):
        jg.stage(loss, params, {**batch, "x": data["x"]}, wrt)
    with pytest.raises(jg.RowsError, match=r"'scale' is a scalar.*by `vary`"):
        jg.stage(loss, params, {**batch, "scale": 1.0}, wrt)
    staged = jg.stage(loss, params, batch, wrt)
    with pytest.raises(jg.RowsError, match=r"the dataset has no rows: 'x' has shape \[0, 5\]"):
        staged.prepare(batch_of(data, slice(0)))
    with pytest.raises(jg.StageError, match=r"'x' of the dataset has rows of float32\[4\].*\[5\]"):
        staged.prepare({**data, "x": data["x"][:, :4]})
    with pytest.raises(jg.StageError, match="Both must have one structure"):
        staged.prepare({"x": data["x"]})
    features = staged.prepare(data)
    trainable, frozen = jg.partition(params, wrt)
    with pytest.raises(jg.StageError, match=r"hole at 'c/b', which is trained. Pass the selected"):
        staged.loss(frozen, features)
    with pytest.raises(
        jg.StageError, match=r"'c/b' is float32\[4\] and was staged as float32\[3\]"
    ):
        staged.loss({**trainable, "c": {**trainable["c"], "b": jnp.ones(4)}}, features)
    with pytest.raises(jg.StageError, match="trainable"):
        staged.loss({"c": trainable["c"]}, features)


def test_networkx_and_rich_are_not_imported_before_they_are_needed():
    import subprocess
    import sys

    code = "import sys, jaxgrad; print([m for m in ('networkx', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Phases of a fine-tune that train more and more.


def test_what_is_staged_is_staged_again():
    loss, params, data, _ = CASES["MLP, head"]()
    wide, narrow = "!a/**", "c/**"
    first = jg.stage(loss, params, batch_of(data, slice(6)), wide)
    features = first.prepare(data)
    trainable, _ = jg.partition(params, wide)
    second = jg.stage(first.loss, trainable, features[:6], narrow)
    head, _ = jg.partition(trainable, narrow)
    again = second.prepare(features)
    rows = slice(2, 7)
    close(second.loss(head, again[rows]), loss(params, batch_of(data, rows)), 1e-5)
    assert second.report().staged
    # The second phase does not run the first layer again: its weights are not there.
    assert not any(leaf.shape == params["a"]["w"].shape for leaf in jax.tree.leaves(second))


@pytest.mark.parametrize("stage", [True, False])
def test_fit_in_phases_from_one_preparation(monkeypatch, stage):
    monkeypatch.setattr("jaxgrad._staging.report._COMPILATION", 0.0)
    monkeypatch.setattr("jaxgrad._staging.report._STEP", 0.0)
    loss, params, data, _ = CASES["MLP, head"]()
    wide = "!a/**"
    trainable, frozen = jg.partition(params, wide)
    staged = jg.stage(loss, params, batch_of(data, slice(5)), wide)
    features = staged.prepare(data)
    tx, options = optax.sgd(0.1), {"batch_size": 5, "epochs": 8}
    head = jg.fit(staged.loss, trainable, features, tx, wrt="c/**", stage=stage, **options)
    assert ("runs once per row" in head.staging) == stage
    more = jg.fit(staged.loss, head.params, features, tx, **options)
    expected = jg.fit(loss, params, data, tx, wrt="c/**", stage=False, **options)
    expected = jg.fit(loss, expected.params, data, tx, wrt=wide, stage=False, **options)
    close(more.losses, expected.losses, 1e-4)
    close(jg.merge(more.params, frozen), expected.params, 1e-4)
