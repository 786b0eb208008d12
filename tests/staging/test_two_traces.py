"""What a loss does at one batch size and not at another, or with arrays made anew in each trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxgrad as jg
from jaxgrad._staging.two_traces import equal
from jaxgrad._tree.flat import is_key

PARAMS = {"head": jnp.ones(3), "trunk": jnp.eye(3)}
X = jnp.linspace(-1, 1, 21).reshape(7, 3)
HEAD, _ = jg.partition(PARAMS, "head")


def of(frozen):
    """A loss with this between the frozen layer and the head."""
    return lambda p, x: jnp.mean(frozen(x @ p["trunk"]) @ p["head"])


def both(frozen, rows=4, taken=4):
    """The staged loss of the first rows, and the loss as it is."""
    loss = of(frozen)
    staged = jg.stage(loss, PARAMS, X[:rows], wrt="head")
    features = staged.prepare(X, progress=False)
    value, grads = jax.value_and_grad(staged.loss)(HEAD, features[np.arange(taken)])
    expected, full = jg.value_and_grad(loss, wrt="head")(PARAMS, X[:taken])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["head"], full["head"], rtol=1e-5)
    return staged.report()


def in_scan(f):
    """Twice in a loop, where calls are not inlined and arrays belong to a program inside."""
    return lambda x: lax.scan(lambda c, _: (jax.jit(f)(c), None), x, None, length=2)[0]


def key():
    with jax.ensure_compile_time_eval():
        return jax.random.key(0)


REMADE = {
    "key": lambda c: c * jax.random.normal(key(), (3,))[None],
    "nan": lambda c: c * jnp.nan_to_num(np.array([1, np.nan, 2], "float32"))[None],
    "numpy": lambda c: c * np.array([[1, 3, 2]], "float32"),
}


@pytest.mark.parametrize("nest", [lambda f: f, in_scan], ids=["outermost", "in a loop"])
@pytest.mark.parametrize("frozen", REMADE.values(), ids=list(REMADE))
def test_arrays_that_each_trace_makes_anew_are_the_same_arrays(frozen, nest):
    assert not both(nest(frozen)).refusals


def test_arrays_are_compared_bit_by_bit():
    nan = np.array([np.nan, 1])
    assert equal(nan, nan.copy()) and equal(1.5, np.float64(1.5))
    assert not equal(np.zeros(1), -np.zeros(1))
    assert not equal(np.zeros(2, "float32"), np.zeros(2, "int32"))
    assert not equal(np.zeros((2, 1)), np.zeros((1, 2)))
    assert equal(jax.random.key(1), jax.random.key(1))
    assert not equal(jax.random.key(1), jax.random.key(2))


UNKNOWN = {
    "position": lambda h: h * np.arange(len(h), dtype="float32")[:, None],
    "size in an array": lambda h: h * np.full((1, 3), 1 / len(h), "float32"),
    "joined along the batch": lambda h: h + 0 * jnp.stack([h[0]] * len(h)),
    "fails at another size": lambda h: h if len(h) == 4 else h[:, :9] @ jnp.ones((2, 2)),
}


@pytest.mark.parametrize("frozen", UNKNOWN.values(), ids=list(UNKNOWN))
def test_a_batch_that_nothing_is_known_of_is_taken_as_it_is(frozen):
    report = both(frozen)
    assert len(report.refusals) == 1 and "the batch" in str(report)


def test_another_number_of_rows_of_such_a_batch_is_refused():
    with pytest.raises(jg.StageError, match="for 3 rows it closes over another array"):
        both(UNKNOWN["position"], taken=3)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda h: jnp.tanh(h) * np.full((1, 3), 2.0 if len(h) == 1 else 1.0, "float32"),
        lambda h: h * np.ones((1, 3), "float32") if len(h) > 1 else h,
    ],
    ids=["another", "none"],
)
def test_another_array_at_one_row_is_refused(frozen):
    with pytest.raises(jg.StageError, match="for 1 rows it closes over another array"):
        both(frozen, taken=1)


def test_a_loop_of_the_batchs_length_that_gives_nothing():
    def body(c, _):
        lax.scan(lambda a, b: (a, None), None, None, length=len(c))
        return jnp.tanh(c), None

    assert not both(lambda h: lax.scan(body, h, None, length=2)[0]).refusals


def test_tokens_have_no_shape():
    def ordered(h):
        h, _ = lax.optimization_barrier((h, lax.create_token()))
        return jnp.tanh(h)

    # Only traced: jax 0.10 can't run a barrier over a token.
    assert isinstance(jg.stage(of(ordered), PARAMS, X, wrt="head"), jg.Staged)
    names = [e.primitive for e in jg.trace(of(ordered), PARAMS, X).equations]
    assert "optimization_barrier" in names


@pytest.mark.parametrize("library", [np, jnp], ids=["numpy", "jax"])
def test_features_of_another_large_array_in_a_loop_are_not_taken_for_these(library, tmp_path):
    def frozen(table):
        turn = lambda c: c * (c @ table).sum(1, keepdims=True) / 100
        return in_scan(turn)

    for value in (1.0, 2.0):  # in the middle, where a table that is printed has an ellipsis
        table = library.asarray(np.where(np.arange(700) == 350, value, 1.0) * np.ones((3, 1)), "f4")
        loss = of(frozen(table))
        staged = jg.stage(loss, PARAMS, X[:4], wrt="head")
        features = staged.prepare(X, where=tmp_path, progress=False)
        np.testing.assert_allclose(staged.loss(HEAD, features[:4]), loss(PARAMS, X[:4]), rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2


SCALARS = {
    "float": (2.0, 3.0),
    "int": (2, 3),
    "bool": (True, False),
    "NumPy": (np.float32(2), np.float32(3)),
    "key": (jax.random.key(0), jax.random.key(1)),
}


@pytest.mark.parametrize("values", SCALARS.values(), ids=list(SCALARS))
def test_features_of_another_number_or_key_are_not_taken_for_these(values, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgrad._staging.min_cut.FLOPS_PER_BYTE", 1e-6)  # store what is small too

    def loss(params, x):
        more = params["more"]
        drawn = jax.random.normal(more, (3,)) if is_key(more) else more
        h = jnp.tanh(x @ params["trunk"]) * jnp.broadcast_to(jnp.asarray(drawn, x.dtype), x.shape)
        return jnp.mean(h @ params["head"])

    for more in (values[0], values[0], values[1]):
        params = {**PARAMS, "more": more}
        staged = jg.stage(loss, params, X[:4], wrt="head")
        features = staged.prepare(X, where=tmp_path, progress=False)
        value = staged.loss(jg.partition(params, "head")[0], features[:4])
        np.testing.assert_allclose(value, loss(params, X[:4]), rtol=1e-5)
    assert len(list(tmp_path.iterdir())) == 2
