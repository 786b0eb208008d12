"""Statistics that `fit` threads through its steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxgrad as jg

ROWS = 22
KEY = jax.random.key(1)


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.2):
        self.first = nnx.Linear(4, 64, rngs=rngs)
        self.trunk = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(16, 2, rngs=rngs)
        self.head_norm = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.head_norm(self.head(self.drop(nnx.relu(self.norm(self.trunk(self.first(x)))))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(16)(x))
        x = linen.Dropout(0.2, deterministic=not train)(linen.relu(x))
        return linen.Dense(2, name="head")(x)


def data():
    x = np.random.default_rng(0).normal(5, 3, (ROWS, 4)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] > 5).astype(np.int32)}


def make(library, wrt="**", rate=0.2):
    if library == "nnx":
        apply, params = jg.functional(Net(nnx.Rngs(0), rate), wrt=wrt)
        flags = {}
    else:
        model, flags = Linen(), {"train": True}
        variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
        apply, params = jg.functional(model, variables, wrt=wrt)

    def loss(params, batch, stats, key):
        logits, stats = apply.train(params, batch["x"], stats=stats, key=key, **flags)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
        return value, stats

    return apply, params, loss


def loop(loss, params, stats, tx, wrt, epochs, batch_size, dataset):
    """The same training, without anything of fit's."""
    trained, rest = jg.partition(params, wrt)
    state, losses, step = tx.init(trained), [], 0

    @jax.jit
    def one(trained, state, stats, batch, step):
        def of_trained(trained):
            key = jax.random.fold_in(KEY, step)
            return loss(jg.merge(trained, rest), batch, stats, key)

        (value, stats), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
        updates, state = tx.update(grads, state, trained)
        return jg.apply_updates(trained, updates), state, stats, value

    for epoch in range(epochs):
        order = np.random.default_rng([*np.asarray(jax.random.key_data(KEY)), epoch])
        order = order.permutation(ROWS)
        for start in range(0, ROWS, batch_size):
            rows = order[start : start + batch_size]
            batch = jax.tree.map(lambda x: x[rows], dataset)  # noqa: B023
            trained, state, stats, value = one(trained, state, stats, batch, step)
            losses.append(value)
            step += 1
    return jg.merge(trained, rest), stats, np.array(losses)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("library", ["nnx", "linen"])
@pytest.mark.parametrize("wrt", ["**", "head*"])
def test_statistics_go_from_step_to_step_as_in_a_loop(library, wrt):
    apply, params, loss = make(library, wrt)
    tx = optax.sgd(0.05, momentum=0.9)
    state = jg.fit(
        loss, params, data(), tx, wrt=wrt, epochs=3, batch_size=8, key=KEY, stats=apply.stats
    )
    want, stats, losses = loop(loss, params, apply.stats, tx, wrt, 3, 8, data())
    assert jax.tree.structure(state.stats) == jax.tree.structure(apply.stats)
    np.testing.assert_allclose(state.losses, losses, rtol=1e-4)
    close(state.stats, stats, rtol=1e-4, atol=1e-5)
    close(state.params, want, rtol=1e-3, atol=1e-5)


def test_statistics_of_frozen_layers_stay_bit_for_bit():
    apply, params, loss = make("nnx", "head*")
    state = jg.fit(
        loss,
        params,
        data(),
        optax.sgd(0.05),
        wrt="head*",
        batch_size=8,
        key=KEY,
        stats=apply.stats,
    )
    same(state.stats["norm"], apply.stats["norm"])
    assert not np.array_equal(state.stats["head_norm"]["mean"], apply.stats["head_norm"]["mean"])


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_a_resumed_run_has_the_statistics_of_one_that_was_not_interrupted(library, tmp_path):
    apply, params, loss = make(library)

    def run(epochs, **more):
        tx = optax.sgd(0.05, momentum=0.9)
        return jg.fit(
            loss,
            params,
            data(),
            tx,
            epochs=epochs,
            batch_size=8,
            key=KEY,
            stats=apply.stats,
            **more,
        )

    whole = run(4)
    half = run(2, checkpoint=tmp_path / "run")
    resumed = run(4, checkpoint=tmp_path / "run", resume=True)
    same((resumed.params, resumed.stats), (whole.params, whole.stats))
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    mean = [jax.tree.leaves(s)[0] for s in (apply.stats, half.stats, whole.stats)]
    assert not np.array_equal(mean[0], mean[1])
    assert not np.array_equal(mean[1], mean[2])


def test_frozen_statistics_do_not_keep_the_trunk_from_being_staged():
    apply, params, with_key = make("nnx", "head*", rate=0.0)
    loss = lambda params, batch, stats: with_key(params, batch, stats, None)
    tx = jg.param_groups({"head*": optax.sgd(0.05)})
    options = dict(epochs=2, batch_size=8, stats=apply.stats)
    staged = jg.fit(loss, params, data(), tx, stage=True, **options)
    plain = jg.fit(loss, params, data(), tx, stage=False, **options)
    assert staged.staging.startswith("the frozen part runs once per row")
    np.testing.assert_allclose(staged.losses, plain.losses, rtol=1e-5)
    close(staged.stats, plain.stats, rtol=1e-5, atol=1e-6)
    close(staged.params, plain.params, rtol=1e-4, atol=1e-6)


def test_a_skipped_step_leaves_the_statistics_alone():
    apply, params, loss = make("nnx")
    dataset = data()
    dataset["x"][8:16] = np.nan
    state = jg.fit(
        lambda p, b, stats: loss(p, b, stats, KEY),
        params,
        dataset,
        optax.sgd(0.05),
        batch_size=8,
        stats=apply.stats,
        max_nonfinite_steps=1,
    )
    assert np.isnan(state.losses[1])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.stats, state.params)))


def test_a_stream_threads_statistics_too():
    apply, params, loss = make("nnx")
    dataset = data()

    class Batches:
        def __iter__(self):
            yield from (jax.tree.map(lambda x: x[i : i + 8], dataset) for i in (0, 8))  # noqa: B023

    options = dict(key=KEY, stats=apply.stats)
    state = jg.fit(loss, params, Batches(), optax.sgd(0.05), **options)
    assert not np.array_equal(state.stats["norm"]["mean"], apply.stats["norm"]["mean"])


def dropping(apply, **flags):
    def loss(params, batch, key):
        logits, _ = apply.train(params, batch["x"], key=key, **flags)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_loss_that_drops_new_statistics_is_refused(wrap):
    apply, params, _ = make("nnx")
    with pytest.raises(jg.GradientError, match=r"the statistics .*'norm/mean'.* drops the new"):
        jg.fit(wrap(dropping(apply)), params, data(), optax.sgd(0.1), batch_size=8, key=KEY)
    apply, params, _ = make("linen")
    loss = dropping(apply, train=True)
    with pytest.raises(jg.GradientError, match=r"fit\(\.\.\., stats=apply\.stats\)"):
        jg.fit(wrap(loss), params, data(), optax.sgd(0.1), batch_size=8, key=KEY)


def test_a_loss_that_drops_statistics_of_a_stream_is_refused():
    apply, params, _ = make("nnx")

    class Batches:
        def __iter__(self):
            yield data()

    with pytest.raises(jg.GradientError, match="drops the new"):
        jg.fit(dropping(apply), params, Batches(), optax.sgd(0.1), key=KEY)


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_frozen_statistics_are_not_dropped(library):
    wrt = "head" if library == "linen" else "head/**"
    apply, params, _ = make(library, wrt)
    loss = dropping(apply, **({"train": True} if library == "linen" else {}))
    assert jg.fit(loss, params, data(), optax.sgd(0.1), wrt=wrt, batch_size=8, key=KEY).step == 3


def test_statistics_returned_as_they_were_are_refused():
    apply, params, loss = make("nnx")

    def forgets(params, batch, stats, key):
        return loss(params, batch, stats, key)[0], stats

    with pytest.raises(jg.GradientError, match="returns them as they were"):
        jg.fit(forgets, params, data(), optax.sgd(0.1), batch_size=8, key=KEY, stats=apply.stats)


@pytest.mark.parametrize(
    ("make_loss", "message"),
    [
        (lambda f: lambda p, b, stats: f(p, b, stats)[0], r"float32\[\]. Because it takes stats"),
        (lambda f: lambda p, b, stats: (f(p, b, stats)[0], {}), "has 4 leaves that"),
        (
            lambda f: lambda p, b, stats: (f(p, b, stats)[0], jax.tree.map(jnp.sum, stats)),
            r"'head_norm/mean' float32\[2\], and returns float32\[\]",
        ),
    ],
)
def test_statistics_of_another_form_are_refused(make_loss, message):
    apply, params, loss = make("nnx")
    wrong = make_loss(lambda p, b, stats: loss(p, b, stats, KEY))
    with pytest.raises(jg.GradientError, match=message):
        jg.fit(wrong, params, data(), optax.sgd(0.1), batch_size=8, stats=apply.stats)


def test_statistics_and_the_argument_of_the_loss_go_together():
    apply, params, loss = make("nnx")
    with pytest.raises(ValueError, match=r"takes an argument 'stats'.*stats=apply\.stats"):
        jg.fit(loss, params, data(), optax.sgd(0.1), key=KEY)
    plain = lambda params, batch: jnp.sum(params["head"]["bias"])
    with pytest.raises(ValueError, match="fit was passed stats, but the loss takes none"):
        jg.fit(plain, params, data(), optax.sgd(0.1), stats=apply.stats)
