"""`predict`: the outputs of all rows in order, whatever the dataset and the batches are."""

import functools
from typing import NamedTuple

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg

X = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)}
WANT = X @ np.asarray(PARAMS["w"])


class Loader:
    def __iter__(self):
        return iter([X[:4], X[4:8], X[8:9], X[9:]])


class Out(NamedTuple):
    logits: jax.Array
    label: jax.Array
    unused: None = None


def linear(params, x):
    return x @ params["w"]


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(a) is np.ndarray and a.flags.writeable
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 9, 10, 256])
def test_arrays(batch_size, tmp_path):
    np.save(tmp_path / "x.npy", X)
    for data in (X, jnp.asarray(X), np.load(tmp_path / "x.npy", mmap_mode="r")):
        same(jg.predict(linear, PARAMS, data, batch_size=batch_size), WANT)


def test_streams():
    source = grain.MapDataset.source([*X]).batch(4)
    for data in (Loader(), iter(Loader()), source, source.to_iter_dataset()):
        same(jg.predict(linear, PARAMS, data), WANT)


def test_a_tree_of_outputs_stays_that_tree():
    def outputs(params, batch):
        logits = linear(params, batch["x"])
        return {"out": Out(logits, logits.argmax(-1)), "rest": [batch["x"] > 0, None]}

    got = jg.predict(outputs, PARAMS, {"x": X}, batch_size=4)
    same(got, {"out": Out(WANT, WANT.argmax(-1)), "rest": [X > 0, None]})
    half = jg.predict(lambda p, x: x.astype(jnp.bfloat16), PARAMS, X)
    assert half.dtype == jnp.bfloat16


def test_models():
    apply, weights = jg.functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    stats = {"mean": jnp.ones(3), "var": jnp.full(3, 4.0)}
    want = (X - 1) / np.sqrt(4 + 1e-5)
    same(jg.predict(apply, weights, X, stats=stats, batch_size=4), want)
    same(jg.predict(functools.partial(apply, stats=stats), weights, X, batch_size=4), want)
    same(jg.predict(apply, weights, X), X / np.sqrt(1 + 1e-5))
    mlp = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))  # an activation is among its leaves
    same(jg.predict(lambda m, x: jax.vmap(m)(x), mlp, X, batch_size=4), jax.vmap(mlp)(X))


def test_a_function_is_compiled_for_two_shapes():
    traced = []

    def counting(params, x):
        traced.append(len(x))
        return linear(params, x)

    for _ in range(2):
        jg.predict(counting, PARAMS, X, batch_size=4)
    assert traced == [4, 2]


@pytest.mark.parametrize(
    ("fun", "text"),
    [
        (lambda p, x: x.mean(), r"the output is float32\[\] for a batch of 4 rows; it must have a"),
        (lambda p, x: {"y": x, "w": p["w"]}, r"the output 'w' is float32\[3,2\] for a batch of 4"),
        (lambda p, x: [x, 1], r"the output '1' is int32\[\] for a batch of 4 rows"),
        (lambda p, x: x.T, r"the output is float32\[3,4\]"),
        (lambda p, x: {"name": "a"}, "the output 'name' is of type str, and no array"),
        (lambda p, x: jax.random.split(jax.random.key(0), 4), r"the output is key<fry>\[4\]"),
    ],
)
def test_an_output_without_the_rows_is_named(fun, text):
    with pytest.raises(ValueError, match=text):
        jg.predict(fun, PARAMS, X, batch_size=4)


def test_outputs_that_differ_between_batches_are_named():
    lengths = iter([np.ones((2, 3), np.float32), np.ones((2, 5), np.float32)])
    text = r"the outputs of batch 2 are float32\[2,5\], and those of batch 1 float32\[2,3\]"
    with pytest.raises(ValueError, match=text):
        jg.predict(lambda p, x: x, PARAMS, lengths)
    other = lambda p, x: {"a": x} if len(x) == 4 else {"b": x}
    with pytest.raises(ValueError, match=r"batch 3 are 'b' float32\[2,3\], .* 'a' float32\[4,3\]"):
        jg.predict(other, PARAMS, X, batch_size=4)


def test_there_must_be_rows():
    with pytest.raises(jg.RowsError, match="the dataset has no rows"):
        jg.predict(linear, PARAMS, X[:0])
    with pytest.raises(jg.RowsError, match="predict: the tuple_iterator gives no batch"):
        jg.predict(linear, PARAMS, iter(()))
    with pytest.raises(ValueError, match="batch_size=0; it must be 1 or more"):
        jg.predict(linear, PARAMS, X, batch_size=0)
    with pytest.raises(ValueError, match="predict has statistics, and fun takes none"):
        jg.predict(linear, PARAMS, X, stats={"mean": jnp.ones(3)})
