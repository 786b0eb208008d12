"""Gradients that an optimizer accumulates over steps: none is lost, or counts too much, unsaid."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg

X = jax.random.normal(jax.random.key(0), (32, 3))
PARAMS = {"head": jnp.ones((3, 1)) / 3}
SHORT = "counts as much as a full one"
REST = "not applied: the steps are not a multiple of every_k_schedule"


def loss(p, b):
    return jnp.mean((b["x"] @ p["head"] - b["y"]) ** 2)


def data(rows):
    return {
        "x": X[:rows],
        "y": X[:rows].sum(1, keepdims=True) + jnp.arange(float(rows))[:, None] / 8,
    }


def multi(k):
    return optax.MultiSteps(optax.sgd(0.1), k).gradient_transformation()


def fit(dataset, tx, **options):
    """The state, and what was said."""
    with warnings.catch_warnings(record=True) as caught, jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("always")
        state = jg.fit(loss, PARAMS, dataset, tx, batch_size=8, progress=False, **options)
    assert all(w.filename == __file__ for w in caught)
    return state, [str(w.message) for w in caught]


def test_steps_that_fill_it_are_those_of_larger_batches():
    state, said = fit(data(32), multi(2))
    with jax.numpy_dtype_promotion("standard"):
        want = jg.fit(loss, PARAMS, data(32), optax.sgd(0.1), batch_size=16, progress=False)
    np.testing.assert_allclose(state.params["head"], want.params["head"], rtol=1e-5)
    assert said == []


class Batches:
    def __iter__(self):
        return iter([data(8), data(8), data(4)])


TX = {
    "by itself": multi,
    "in a chain": lambda k: optax.chain(optax.clip(1e3), multi(k)),
    "in a group": lambda k: jg.param_groups({"head": multi(k)}),
    "by a schedule": lambda k: multi(lambda step: k),
    "around a chain": lambda k: optax.MultiSteps(
        optax.chain(optax.clip(1e3), optax.sgd(0.1)), k
    ).gradient_transformation(),
}


@pytest.mark.parametrize(
    ("rows", "k", "epochs", "words"),
    [
        (24, 2, 1, [REST]),
        (24, 2, 2, []),
        (32, 3, 1, [REST]),
        (12, 2, 1, [SHORT]),
        (4, 1, 1, []),
        (4, 2, 1, [REST]),
    ],
)
def test_what_does_not_fit_is_said(rows, k, epochs, words):
    _, said = fit(data(rows), multi(k), epochs=epochs)
    assert len(said) == len(words)
    assert all(word in text for word, text in zip(words, said, strict=True)), said


@pytest.mark.parametrize("name", TX)
def test_wherever_it_is_in_the_optimizer(name):
    _, said = fit(data(20), TX[name](2))
    assert [SHORT in said[0], REST in said[1]] == [True, True]


def test_the_texts():
    _, (short, rest) = fit(data(20), multi(2))
    assert short == (
        "tx accumulates gradients (optax.MultiSteps), and the last batch of each epoch has 4 of "
        "batch_size=8 rows but counts as much as a full one. Take the rows that batch_size "
        "divides, 16 of 20, or another batch_size."
    )
    assert rest == (
        "tx accumulates gradients (optax.MultiSteps), and the last 1 of the run is not applied: "
        "the steps are not a multiple of every_k_schedule. Choose epochs and batch_size so that "
        "they are; or resume the run, whose checkpoint holds what is accumulated."
    )


def test_a_stream_of_batches():
    _, said = fit(Batches(), multi(3))
    assert said == [
        "tx accumulates gradients (optax.MultiSteps), and the batches had [4, 8] rows, which count "
        "alike. Drop the short ones (drop_remainder=True in Grain's batch)."
    ]


def test_a_run_that_is_resumed_applies_its_rest(tmp_path):
    _, said = fit(data(24), multi(2), checkpoint=tmp_path)
    assert len(said) == 1
    state, said = fit(data(24), multi(2), epochs=2, checkpoint=tmp_path, resume=True)
    whole, _ = fit(data(24), multi(2), epochs=2)
    assert said == []
    np.testing.assert_array_equal(state.params["head"], whole.params["head"])


def test_nothing_is_said_where_nothing_accumulates():
    assert fit(data(12), optax.sgd(0.1))[1] == []
