import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad._staging import features as _features
from jaxgrad._staging import min_cut, precompute
from tests.losses import CASES


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(min_cut, "FLOPS_PER_BYTE", 1e-6)
    monkeypatch.setattr(_features, "BYTES_PER_FILE", 100)  # several files per dataset


@pytest.fixture
def case():
    loss, params, data, wrt = CASES["MLP, head"]()
    batch = jax.tree.map(lambda a: a[:4], data)
    return jg.stage(loss, params, batch, wrt), data, jg.partition(params, wrt)[0]


def arrays(features):
    return [np.asarray(v[np.arange(len(features))]) for v in features.values]


def test_all_places_hold_the_same(case, tmp_path):
    staged, data, head = case
    device = staged.prepare(data)
    rows = np.array([7, 0, 9, 7, 3])
    for where in ("host", tmp_path):
        features = staged.prepare(data, where)
        assert len(features) == len(device) == 10
        for a, b in zip(arrays(features), arrays(device), strict=True):
            np.testing.assert_array_equal(a, b)
        assert all(isinstance(v, jax.Array) for v in features[rows].values)
        assert staged.loss(head, features[rows]) == staged.loss(head, device[rows])
        assert features.stats is not None and features.stats.nbytes == 10 * (6 * 4 + 3)


def test_slices_and_masks(case, tmp_path):
    staged, data, _ = case
    features = staged.prepare(data, tmp_path)
    mask = np.arange(10) % 3 == 0
    for rows in (slice(2, 9, 2), slice(-3, None), mask):
        for a, b in zip(features[rows].values, arrays(features), strict=True):
            np.testing.assert_array_equal(a, b[rows])


def test_files_are_written_once(case, tmp_path):
    staged, data, _ = case
    expected = arrays(staged.prepare(data, tmp_path))
    files = sorted(tmp_path.glob("*/*"))
    assert len(files) == 3 and all(f.suffix == ".bin" for f in files)
    times = [f.stat().st_mtime_ns for f in files]
    again = staged.prepare(data, tmp_path)
    assert [f.stat().st_mtime_ns for f in sorted(tmp_path.glob("*/*"))] == times
    np.testing.assert_array_equal(arrays(again)[0], expected[0])


def test_a_killed_preparation_goes_on(case, tmp_path, monkeypatch):
    staged, data, _ = case
    expected = arrays(staged.prepare(data))
    replace, done = os.replace, []

    def killed(a, b):
        if done:
            raise KeyboardInterrupt
        done.append(b)
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        staged.prepare(data, tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    (first,) = tmp_path.glob("*/*.bin")
    written = first.stat().st_mtime_ns
    features = staged.prepare(data, tmp_path)
    assert first.stat().st_mtime_ns == written  # not computed again
    for a, b in zip(arrays(features), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_torn_file_is_written_anew(case, tmp_path):
    staged, data, _ = case
    expected = arrays(staged.prepare(data, tmp_path))
    torn = sorted(tmp_path.glob("*/*.bin"))[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    _features._map.cache_clear()
    np.testing.assert_array_equal(arrays(staged.prepare(data, tmp_path))[0], expected[0])


@pytest.mark.parametrize("change", ["parameters", "data", "computation", "batch size", "dtype"])
def test_a_stale_cache_is_never_used(change, tmp_path):
    loss, params, data, wrt = CASES["MLP, head"]()

    def folders(loss, params, data, rows=4, dtype=None):
        batch = jax.tree.map(lambda a: a[:rows], data)
        staged = jg.stage(loss, params, batch, wrt)
        staged.prepare(data, tmp_path, features_dtype=dtype)
        return len(list(tmp_path.iterdir()))

    assert folders(loss, params, data) == 1
    other = {**params, "c": jax.tree.map(lambda a: a + 1, params["c"])}
    labels = {**data, "x": np.asarray(data["x"])}
    assert folders(loss, other, labels) == 1  # what is trained is no part of it
    match change:
        case "parameters":
            count = folders(loss, {**params, "a": {**params["a"], "w": params["a"]["w"] * 2}}, data)
        case "data":
            count = folders(loss, params, {**data, "x": data["x"].at[-1, -1].add(1)})
        case "computation":
            count = folders(lambda p, b: loss(p, {**b, "x": jnp.sin(b["x"])}), params, data)
        case "batch size":
            count = folders(loss, params, data, rows=5)
        case _:
            count = folders(loss, params, data, dtype="int8")
    assert count == 2


@pytest.mark.parametrize(("dtype", "most", "nbytes"), [("bfloat16", 4e-3, 15), ("int8", 1e-2, 13)])
@pytest.mark.parametrize("where", ["device", "disk"])
def test_fewer_bits(case, dtype, most, nbytes, where, tmp_path):
    staged, data, head = case
    exact = staged.prepare(data)
    stored = staged.prepare(data, tmp_path if where == "disk" else where, features_dtype=dtype)
    assert stored.stats.nbytes == 10 * nbytes
    assert 0 < stored.stats.error < most
    assert exact.stats.error == 0
    decoded = np.asarray(stored.values[0][np.arange(10)], np.float32)
    if dtype == "int8":
        decoded = decoded * np.asarray(stored.values[1][np.arange(10)])
    true = np.asarray(exact.values[0])
    error = np.sqrt(np.sum((decoded - true) ** 2) / np.sum(true**2))
    np.testing.assert_allclose(stored.stats.error, error, rtol=0.3)  # the last chunk overlaps
    rows = slice(0, 4)
    a, b = staged.loss(head, stored[rows]), staged.loss(head, exact[rows])
    assert 0 < abs(a - b) < 0.05 * abs(b)


def test_the_labels_are_not_copied(monkeypatch):
    monkeypatch.setattr(min_cut, "FLOPS_PER_BYTE", 10)
    monkeypatch.setattr(min_cut, "BYTES_PER_READ", 0)

    def loss(params, batch):
        h = batch["x"]
        for _ in range(50):
            h = jnp.tanh(h @ params["trunk"])
        return jnp.mean((h @ params["head"] - batch["y"]) ** 2)

    params = {"trunk": jnp.eye(5), "head": jnp.ones((5, 2))}
    data = {"x": jnp.ones((8, 5)), "y": jnp.ones((8, 2))}
    staged = jg.stage(loss, params, jax.tree.map(lambda a: a[:4], data), "head")
    assert any(v is data["y"] for v in staged.prepare(data).values)


def test_budget(case):
    staged, data, _ = case
    with pytest.raises(
        jg.StageError, match=r"take 270 bytes and the budget is 269. Keep them on d"
    ):
        staged.prepare(data, budget_bytes=269)
    assert staged.prepare(data, budget_bytes=270).stats.where == "device"
    with pytest.raises(jg.StageError, match="the budget is 10"):
        staged.prepare(data, "host", budget_bytes=10)


def test_no_room(case, monkeypatch):
    staged, data, _ = case
    monkeypatch.setattr(precompute, "_free", lambda host: 100)
    with pytest.raises(jg.StageError, match="there is not enough memory"):
        staged.prepare(data)


def test_features_off_the_device_are_not_indexed_under_jit(case):
    staged, data, _ = case
    features = staged.prepare(data, "host")
    with pytest.raises(TypeError, match=r"can't be indexed under jit.*Index before"):
        jax.jit(lambda rows: features[rows])(jnp.arange(3))


def test_unknown_encoding(case):
    staged, data, _ = case
    with pytest.raises(jg.StageError, match="'int4'; expected one of None, 'bfloat16', 'int8'"):
        staged.prepare(data, features_dtype="int4")


def test_a_wrong_rule_is_found_out_on_real_rows(case, monkeypatch):
    """Should the proof be wrong, running the frozen part on other rows shows it."""
    from jaxgrad._staging import dependence

    monkeypatch.setitem(dependence.RULES, "reduce_sum", lambda step: 0)
    monkeypatch.setitem(dependence.RULES, "sort", lambda step: 0)

    def loss(params, batch):
        return jnp.mean(jnp.sort(jnp.sin(batch @ params["a"]), 0) @ params["b"])

    x = jax.random.normal(jax.random.key(0), (8, 3))
    staged = jg.stage(loss, {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}, x[:4], "b")
    with pytest.raises(jg.StageError, match=r"from sort at .*test_features.py.* among other"):
        staged.prepare(x)
