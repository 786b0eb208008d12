"""Metrics that the loss returns, and optimizers that take more than gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jaxgrad as jg

X = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float32)
DATA = {"x": X, "y": X.sum(1, keepdims=True)}
PARAMS = {
    "trunk": jax.random.normal(jax.random.key(1), (3, 4)),
    "mid": jnp.eye(4),
    "head": jnp.ones((4, 1)) / 4,
}


def loss(p, b):
    return jnp.mean((jnp.tanh(b["x"] @ p["trunk"]) @ p["mid"] @ p["head"] - b["y"]) ** 2)


def with_metrics(p, b):
    return loss(p, b), {"norm": jnp.linalg.norm(p["head"]), "rows": b["x"].shape[0]}


def by_hand(tx, wrt, epochs):
    trained, rest = jg.partition(PARAMS, wrt)
    tx, metrics = optax.with_extra_args_support(tx), []
    state, losses = tx.init(trained), []

    @jax.jit
    def step(trained, state, b):
        of_trained = lambda t: loss(jg.merge(t, rest), b)
        value, grads = jax.value_and_grad(of_trained)(trained)
        updates, state = tx.update(
            grads, state, trained, value=value, grad=grads, value_fn=of_trained
        )
        return optax.apply_updates(trained, updates), state, value

    for _ in range(epochs):
        metrics.append([])
        for i in range(0, 22, 8):
            b = jax.tree.map(lambda x: x[i : i + 8], DATA)  # noqa: B023
            metrics[-1].append(with_metrics(jg.merge(trained, rest), b)[1])
            trained, state, value = step(trained, state, b)
            losses.append(value)
    return jg.merge(trained, rest), np.array(losses), metrics


def test_metrics_of_the_loss_go_into_the_history_as_means_over_steps():
    tx = optax.sgd(0.1)
    state = jg.fit(with_metrics, PARAMS, DATA, tx, epochs=3, batch_size=8, has_aux=True)
    _, losses, metrics = by_hand(tx, "**", 3)
    np.testing.assert_allclose(state.losses, losses, rtol=1e-4)
    for record, steps in zip(state.history, metrics, strict=True):
        for name in ("norm", "rows"):
            np.testing.assert_allclose(record[name], np.mean([m[name] for m in steps]), rtol=1e-4)


def test_metrics_and_statistics_together():
    def both(p, b, stats):
        return loss(p, b), ({"count": stats["count"] + 1.0}, {"seen": stats["count"]})

    stats = {"count": jnp.zeros(())}
    state = jg.fit(
        both, PARAMS, DATA, optax.sgd(0.1), epochs=2, batch_size=8, has_aux=True, stats=stats
    )
    assert state.stats["count"] == 6
    assert [record["seen"] for record in state.history] == [1.0, 4.0]


def test_metrics_of_a_chunk_survive_an_interruption_within_it(tmp_path):
    tx = optax.sgd(0.1)

    def run(**more):
        options = dict(epochs=2, batch_size=2, callback_every=4, has_aux=True, stage=False)
        return jg.fit(with_metrics, PARAMS, DATA, tx, **options, **more)

    def stop(state):
        if state.step == 8:
            raise jg.StopTraining

    whole = run()
    run(checkpoint=tmp_path / "run", callbacks=[stop])
    resumed = run(checkpoint=tmp_path / "run", resume=True)
    assert [r["norm"] for r in resumed.history] == [r["norm"] for r in whole.history]


def test_metrics_of_skipped_steps_do_not_count():
    dataset = {**DATA, "y": np.where(np.arange(22)[:, None] < 8, np.nan, DATA["y"])}
    state = jg.fit(
        lambda p, b: (loss(p, b), {"first": b["y"][0, 0]}),
        PARAMS,
        dataset,
        optax.sgd(0.0),
        batch_size=8,
        has_aux=True,
        max_nonfinite_steps=1,
    )
    assert state.history[0]["skipped"] == 1
    np.testing.assert_allclose(state.history[0]["first"], DATA["y"][[8, 16], 0].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        (jnp.ones(()), "must be a dict of scalars"),
        ({"a": jnp.ones(3)}, r"the metric 'a' is float32\[3\]"),
        ({"a": "x"}, "the metric 'a' is str"),
        ({"loss": jnp.ones(())}, "'loss' can't name a metric"),
    ],
)
def test_metrics_of_another_form_are_refused(aux, message):
    with pytest.raises(jg.GradientError, match=message):
        jg.fit(lambda p, b: (loss(p, b), aux), PARAMS, DATA, optax.sgd(0.1), has_aux=True)


def test_a_pair_is_refused_without_has_aux_and_asked_for_with_it():
    with pytest.raises(jg.GradientError, match="pass has_aux=True"):
        jg.fit(with_metrics, PARAMS, DATA, optax.sgd(0.1))
    with pytest.raises(jg.GradientError, match=r"Because has_aux=True, it must return \(value, me"):
        jg.fit(loss, PARAMS, DATA, optax.sgd(0.1), has_aux=True)


OPTIMIZERS = {
    "plateau": lambda: optax.chain(
        optax.sgd(0.5), optax.contrib.reduce_on_plateau(factor=0.5, patience=1, cooldown=0)
    ),
    "polyak": lambda: optax.polyak_sgd(0.1),
    "lbfgs": optax.lbfgs,
    "line search": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "multi-steps": lambda: optax.MultiSteps(optax.polyak_sgd(0.1), 3).gradient_transformation(),
}


@pytest.mark.filterwarnings("ignore:tx accumulates gradients")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["alone", "in a group"])
def test_optimizers_get_the_loss(name, where):
    make = OPTIMIZERS[name]
    if where == "alone":
        options = {"tx": make(), "wrt": "head"}
    else:
        options = {"tx": jg.param_groups({"head": make()})}
    with jax.numpy_dtype_promotion("standard"):  # Optax adds integers to floats in some
        state = jg.fit(loss, PARAMS, DATA, epochs=4, batch_size=8, **options)
        tx = make()
        tx = optax.GradientTransformationExtraArgs(tx.init, tx.update)
        params, losses, _ = by_hand(tx, "head", 4)
    np.testing.assert_allclose(state.losses, losses, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(state.params["head"], params["head"], rtol=2e-3, atol=1e-4)


def test_each_group_gets_the_loss_of_its_own_leaves():
    tx = jg.param_groups({"head": optax.polyak_sgd(0.1), "mid": optax.lbfgs()})
    state = jg.fit(loss, PARAMS, DATA, tx, epochs=2, batch_size=22)
    assert np.isfinite(state.losses).all()
    # Each group moves as if it were alone, from the same place.
    one = jg.fit(loss, PARAMS, DATA, tx, epochs=1, batch_size=22).params
    for name, alone in (("head", optax.polyak_sgd(0.1)), ("mid", optax.lbfgs())):
        want = jg.fit(loss, PARAMS, DATA, alone, wrt=name, epochs=1, batch_size=22).params
        np.testing.assert_allclose(one[name], want[name], rtol=1e-4, atol=1e-5)
