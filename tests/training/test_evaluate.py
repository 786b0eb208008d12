"""`evaluate`, and the callback that runs it: means, pairs, every kind of dataset, clear errors."""

import functools
import math

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg

RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3)).astype(np.float32)
Y = np.array([0, 0, 0, 0, 1, 1, 0, 1, 2, 2], np.int32)
DATA = {"x": X, "y": Y}
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)}
SCALE = np.array([1.0, 3.0, 0.5], np.float32)


def metrics(params, batch):
    logits = batch["x"] @ params["w"]
    guess, label = logits.argmax(-1), batch["y"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    weight = jnp.asarray(SCALE)[label]
    return {
        "nll": (jnp.sum(nll * weight), jnp.sum(weight)),
        "accuracy": jnp.mean(guess == label),
        "recall": (jnp.sum((guess == 1) & (label == 1)), jnp.sum(label == 1)),
    }


def expected():
    logits = X.astype(np.float64) @ np.asarray(PARAMS["w"], np.float64)
    guess = logits.argmax(-1)
    nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), Y]
    return {
        "nll": np.sum(nll * SCALE[Y]) / SCALE[Y].sum(),
        "accuracy": np.mean(guess == Y),
        "recall": np.sum((guess == 1) & (Y == 1)) / 3,
    }


class Loader:
    """Batches of 4, 4, 1 and 1 rows, as often as they are asked for."""

    def __iter__(self):
        return iter([{"x": X[a:b], "y": Y[a:b]} for a, b in [(0, 4), (4, 8), (8, 9), (9, 10)]])


def memory_mapped(folder):
    np.save(folder / "x.npy", X)
    return {"x": np.load(folder / "x.npy", mmap_mode="r"), "y": Y}


def datasets(tmp_path):
    rows = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    source = grain.MapDataset.source(rows)
    return {
        "NumPy": DATA,
        "JAX": jax.tree.map(jnp.asarray, DATA),
        "memmap": memory_mapped(tmp_path),
        "loader": Loader(),
        "MapDataset": source.batch(4),
        "IterDataset": source.to_iter_dataset().batch(4),
    }


def by_callback(params, data, batch_size):
    test = jg.callbacks.evaluate(metrics, data, batch_size=batch_size, prefix="")
    loss = lambda p, b: 0.0 * jnp.mean(b["x"]) * jnp.sum(p["w"])
    history = jg.fit(loss, params, DATA, optax.sgd(0.1), epochs=2, callbacks=[test]).history
    first, second = ({name: record[name] for name in expected()} for record in history)
    assert first == second
    return first


@pytest.mark.parametrize("kind", ["NumPy", "JAX", "memmap", "loader", "MapDataset", "IterDataset"])
def test_every_dataset_has_the_metrics_of_all_its_rows(kind, tmp_path):
    data = datasets(tmp_path)[kind]
    found = [jg.evaluate(metrics, PARAMS, data, batch_size=n) for n in (1, 4, 10, 256)]
    for one in [*found, by_callback(PARAMS, data, batch_size=4)]:
        assert {*map(type, one.values())} == {float}
        assert one == pytest.approx(expected(), abs=1e-6)
        assert [*one] == [*expected()]  # in the order of the metrics


def test_a_metric_may_be_any_real_scalar():
    found = jg.evaluate(
        lambda p, b: {
            "bool": jnp.all(b["y"] < 2),
            "python bool": True,
            "python int": 3,
            "python float": 0.5,
            "int": jnp.max(b["y"]),
            "bfloat16": jnp.bfloat16(1.5),
            "pair of python": (1, 4.0),
            "list": [jnp.sum(b["y"]), b["y"].size],
        },
        PARAMS,
        DATA,
        batch_size=8,
    )
    assert found == {
        "bool": 0.8,
        "python bool": 1.0,
        "python int": 3.0,
        "python float": 0.5,
        "int": pytest.approx((8 * 1 + 2 * 2) / 10),
        "bfloat16": 1.5,
        "pair of python": 0.25,
        "list": 0.7,
    }


def test_sums_are_in_float64():
    ones = np.ones(20_001, np.float16)
    total = lambda p, b: {"n": (b.sum(), p), "mean": b.mean()}
    found = jg.evaluate(total, jnp.float16(1.0), ones, batch_size=1)
    assert found == {"n": 1.0, "mean": 1.0}  # float16 counts to 2048, float32 to 2**24
    big = np.array([2.0**24, 1.0, 1.0, 1.0], np.float32)
    assert jg.evaluate(lambda p, b: {"x": (b.sum(), 1)}, 0.0, big, batch_size=1) == {
        "x": (2**24 + 3) / 4
    }


def test_a_weight_of_zero_is_nan_only_if_all_are():
    recall = lambda p, b: {"recall": (jnp.sum(b == p), jnp.sum(b == p))}
    assert jg.evaluate(recall, jnp.int32(1), Y, batch_size=3) == {"recall": 1.0}
    assert math.isnan(jg.evaluate(recall, jnp.int32(7), Y)["recall"])


def test_two_shapes_are_compiled_once():
    traced = []

    def counting(params, batch):
        traced.append(len(batch))
        return {"mean": jnp.mean(batch * params)}

    for scale in (np.float32(1.0), np.float32(2.0)):
        jg.evaluate(counting, jnp.asarray(scale), X, batch_size=4)
    assert traced == [4, 2]
    test = jg.callbacks.evaluate(counting, X, batch_size=4)
    loss = lambda p, b: jnp.mean(b) * p
    state = jg.fit(loss, jnp.ones(()), X, optax.sgd(0.1), epochs=3, callbacks=[test])
    assert traced == [4, 2] and len(state.history) == 3


def test_a_function_that_is_compiled_is_not_kept_alive():
    class Metrics:
        def __call__(self, params, batch):
            return {"mean": jnp.mean(batch)}

    import gc
    import weakref

    metric = Metrics()
    jg.evaluate(metric, 1.0, X)
    gone = weakref.ref(metric)
    del metric
    gc.collect()
    assert gone() is None


def test_what_is_not_an_array_stays_what_it_is():
    class Net(eqx.Module):
        linear: eqx.nn.Linear
        drop: eqx.nn.Dropout
        activation: object
        scale: float

        def __call__(self, x):
            assert type(self.scale) is float and self.drop.inference is True
            return self.activation(self.drop(self.linear(x))) * self.scale

    linear = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    net = Net(linear, eqx.nn.Dropout(0.5, inference=True), jax.nn.relu, 2.0)
    mean = lambda net, x: {"mean": jnp.mean(jax.vmap(net)(x))}
    want = float(jnp.mean(jax.vmap(net)(X)))
    assert jg.evaluate(mean, net, X, batch_size=4) == {"mean": pytest.approx(want, rel=1e-5)}
    kind = lambda p, x: {"kind": {bool: 0, int: 1, float: 2}[type(p)]}
    assert [jg.evaluate(kind, p, X)["kind"] for p in (True, 1, 1.0)] == [0, 1, 2]


def test_statistics_are_passed_where_they_are_taken():
    apply, params = jg.functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    stats = {"mean": jnp.ones(3), "var": jnp.full(3, 4.0)}
    takes = lambda p, b, stats: {"mean": jnp.mean(apply(p, b, stats=stats))}
    want = pytest.approx(float(np.mean((X - 1) / 2)), abs=1e-5)
    assert jg.evaluate(takes, params, X, stats=stats, batch_size=4) == {"mean": want}
    with pytest.raises(ValueError, match=r"metrics takes stats, and evaluate has none: pass stats"):
        jg.evaluate(takes, params, X)
    closed = functools.partial(takes, stats=stats)
    assert jg.evaluate(closed, params, X) == {"mean": want}
    lacks = lambda p, b: {"mean": jnp.mean(apply(p, b))}
    with pytest.raises(ValueError, match=r"evaluate has statistics, and metrics takes none"):
        jg.evaluate(lacks, params, X, stats=stats)
    assert jg.evaluate(lacks, params, X, stats={}).keys() == {"mean"}
    state = jg.TrainState(params, None, 1, np.zeros(1), (), "", stats=stats)
    assert jg.callbacks.evaluate(takes, X)(state) == {"test_mean": want}
    with pytest.raises(ValueError, match=r"callbacks\.evaluate has statistics, and metrics takes"):
        jg.callbacks.evaluate(lacks, X)(state)


def test_an_nnx_module_that_would_move_is_refused():
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    mean = lambda m, x: {"mean": jnp.mean(m(x))}
    with pytest.raises(jg.GradientError, match=r"the function changes 'mean', 'var' of the NNX"):
        jg.evaluate(mean, model, X)
    model.eval()
    assert jg.evaluate(mean, model, X)["mean"] == pytest.approx(X.mean(), abs=1e-4)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (jnp.mean, r"metrics return float32\[\], not a dict\. Return .*\{\"loss\": value\}"),
        (lambda x: None, "metrics return NoneType, not a dict"),
        (lambda x: {"rows": x[:, 0]}, r"the metric 'rows' is float32\[4\], of a batch of 4 rows; "),
        (lambda x: {"one": x[:1, 0]}, r"the metric 'one' is float32\[1\], .*a mean over the rows"),
        (lambda x: {"p": (x[:, 0], 1)}, r"the metric 'p' is \(float32\[4\], int32\[\]\)"),
        (lambda x: {"p": (1.0, 1, 1)}, r"'p' is \(float32\[\], int32\[\], int32\[\]\)"),
        (lambda x: {"p": (1.0,)}, r"'p' is \(float32\[\]\)"),
        (lambda x: {"text": "good"}, "the metric 'text' is str"),
        (lambda x: {"none": None}, "the metric 'none' is NoneType"),
        (lambda x: {"z": jnp.complex64(1j)}, r"the metric 'z' is complex64\[\]"),
        (lambda x: {"d": {"a": 1.0}}, "the metric 'd' is dict"),
        (lambda x: {1: x.mean()}, "by 1; the name of a metric is a string"),
    ],
)
def test_a_metric_that_is_none_is_named(returned, text):
    with pytest.raises(ValueError, match=text):
        jg.evaluate(lambda p, b: returned(b), PARAMS, X, batch_size=4)


def test_metrics_that_change_between_batches_are_named():
    more = lambda p, b: {"a": b.mean()} | ({} if len(b) == 4 else {"b": b.mean()})
    text = "metrics return 'a', 'b' for batch 3, of 2 rows, and 'a' for those before"
    with pytest.raises(ValueError, match=text):
        jg.evaluate(more, PARAMS, X, batch_size=4)
    pair = lambda p, b: {"a": b.mean() if len(b) == 4 else (b.sum(), 1)}
    with pytest.raises(ValueError, match=r"metrics return 'a' \(a pair\) for batch 3"):
        jg.evaluate(pair, PARAMS, X, batch_size=4)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"x": X, "y": Y[:3]}, jg.RowsError, "'x' has 10 and 'y' has 3"),
        (X[:0], jg.RowsError, "the dataset has no rows"),
        ({}, jg.RowsError, "there are no arrays"),
        (iter([]), jg.RowsError, "evaluate: the list_iterator gives no batch"),
        ([X[:0]], jg.RowsError, "the dataset has no rows"),
        (grain.MapDataset.source([{"y": 1}]), jg.RowsError, r"'y' is a scalar\. .*\.batch\(n\)"),
        (iter([X[:2], X[:0]]), jg.RowsError, "a batch of the dataset has no rows"),
        ({"x": X, "name": np.array(["a"] * 10)}, ValueError, r"'name' is <U1\[10\]\. Encode it"),
        ({"x": X, "o": np.array([None] * 10)}, ValueError, r"'o' is object\[10\]"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named(data, error, text):
    with pytest.raises(error, match=text):
        jg.evaluate(lambda p, b: {"one": 1.0}, PARAMS, data)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_a_row(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size}; it must be 1 or more"):
        jg.evaluate(metrics, PARAMS, DATA, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", ["8", 1.5, True, None])
def test_a_batch_has_a_whole_number_of_rows(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size!r}; it must be an integer"):
        jg.evaluate(metrics, PARAMS, DATA, batch_size=batch_size)


def test_one_pass_is_enough_for_the_function_and_too_little_for_the_callback():
    assert jg.evaluate(metrics, PARAMS, iter(Loader())) == pytest.approx(expected(), abs=1e-6)
    with pytest.raises(ValueError, match="one pass uses up this list_iterator"):
        jg.callbacks.evaluate(metrics, iter(Loader()))
