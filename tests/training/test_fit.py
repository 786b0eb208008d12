import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import MLP

KEY = jax.random.key(0)
ROWS = 22


def make():
    apply, params = jg.functional(MLP(6, (5, 4), 3, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    dataset = {
        "x": rng.normal(size=(ROWS, 6)).astype(np.float32),
        "y": rng.integers(0, 3, ROWS).astype(np.int32),
    }

    def loss(params, batch):
        logits = apply(params, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return loss, params, dataset


def by_hand(loss, params, dataset, tx, wrt, orders, batch_size):
    """The same training, a step at a time, without anything of fit's."""
    trainable, _ = jg.partition(params, wrt)
    state, losses = tx.init(trainable), []
    for order in orders:
        for start in range(0, ROWS, batch_size):
            batch = {name: a[order[start : start + batch_size]] for name, a in dataset.items()}
            value, grads = jg.value_and_grad(loss, wrt)(params, batch)
            updates, state = tx.update(grads, state, jg.partition(params, wrt)[0])
            params = jg.apply_updates(params, updates)
            losses.append(value)
    return params, np.array(losses)


def equal(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("every", [None, 1, 2, 100])
def test_fit_takes_every_row_and_gives_what_a_loop_gives(every):
    loss, params, dataset = make()
    tx = jg.param_groups({"head/**": optax.sgd(0.1, momentum=0.9)})
    state = jg.fit(loss, params, dataset, tx, epochs=3, batch_size=5, callback_every=every)
    expected, losses = by_hand(loss, params, dataset, tx, "head/**", [np.arange(ROWS)] * 3, 5)
    assert state.step == len(state.losses) == 15  # four batches of 5 and one of 2, three times
    np.testing.assert_allclose(state.losses, losses, rtol=1e-5)
    equal(state.params, expected, rtol=1e-5, atol=1e-7)
    for layer in (0, 1):
        for leaf, value in params["layers"][layer].items():
            np.testing.assert_array_equal(state.params["layers"][layer][leaf], value)
    assert not [path for path in jg.paths(state.opt_state) if "layers" in path]


def test_shuffling_is_by_the_key_and_takes_each_row_once_an_epoch():
    loss, params, dataset = make()
    run = lambda key: jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=2, batch_size=5, key=key)
    a, b, c = run(KEY), run(KEY), run(jax.random.key(1))
    np.testing.assert_array_equal(a.losses, b.losses)
    equal(a.params, b.params, rtol=0)
    assert (a.losses != c.losses).any()

    rows = {"x": jnp.arange(float(ROWS))}
    tx = optax.sgd(1.0)
    taken = jg.fit(lambda p, b: p * b["x"].sum(), jnp.array(0.0), rows, tx, batch_size=5, key=KEY)
    assert -taken.params == ROWS * (ROWS - 1) / 2


def test_wrt_comes_from_the_groups_or_is_given():
    loss, params, dataset = make()
    moved = lambda state: [
        path
        for path, a, b in zip(
            jg.paths(params), *map(jax.tree.leaves, (params, state.params)), strict=True
        )
        if (a != b).any()
    ]
    head = ["head/bias", "head/kernel"]
    assert (
        moved(jg.fit(loss, params, dataset, jg.param_groups({"head/**": optax.sgd(0.1)}))) == head
    )
    assert moved(jg.fit(loss, params, dataset, optax.sgd(0.1, momentum=0.9), wrt="head/**")) == head
    assert moved(jg.fit(loss, params, dataset, optax.sgd(0.1))) == jg.paths(params)


def test_the_callers_parameters_stay_usable():
    loss, params, dataset = make()
    before = jax.tree.map(np.array, params)
    kept = []
    jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=3, callbacks=[kept.append])
    equal(params, before, rtol=0)
    assert all(np.isfinite(np.asarray(s.params["head"]["bias"])).all() for s in kept)


def test_a_loss_with_a_key_gets_a_new_one_each_step():
    def loss(p, batch, key):
        return p + jax.random.normal(key) + 0 * batch["x"].sum()

    dataset = {"x": jnp.ones(6)}
    run = lambda key: jg.fit(
        loss, jnp.array(0.0), dataset, optax.sgd(0.0), batch_size=2, epochs=2, key=key
    )
    state = run(KEY)
    assert len(set(state.losses.tolist())) == 6
    np.testing.assert_array_equal(state.losses, run(KEY).losses)
    with pytest.raises(ValueError, match="an argument 'key', but fit was passed none"):
        run(None)


def test_a_key_that_the_loss_has_already_or_can_do_without():
    def loss(p, batch, key=None):
        return p + (0.0 if key is None else jax.random.normal(key)) + 0 * batch["x"].sum()

    run = lambda loss, key: jg.fit(
        loss, jnp.array(0.0), {"x": jnp.ones(6)}, optax.sgd(0.0), batch_size=2, key=key
    ).losses.tolist()
    assert run(loss, None) == [0.0] * 3
    assert len(set(run(loss, KEY))) == 3
    assert len(set(run(functools.partial(loss, key=jax.random.key(1)), KEY))) == 1


def test_an_optimizer_whose_state_holds_the_parameters():
    loss, params, dataset = make()
    with jax.numpy_dtype_promotion("standard"):
        state = jg.fit(loss, params, dataset, optax.contrib.prodigy(), batch_size=11)
    assert state.step == 2 and np.isfinite(state.losses).all()


def test_callbacks_add_to_the_history_and_can_stop():
    loss, params, dataset = make()

    def evaluate(state):
        if state.step >= 6:
            raise jg.StopTraining
        return {"steps_seen": state.step}

    state = jg.fit(
        loss,
        params,
        dataset,
        optax.sgd(0.1),
        epochs=9,
        batch_size=11,
        callback_every=2,
        callbacks=[evaluate],
    )
    assert state.step == 6 and len(state.losses) == 6
    assert [r.get("steps_seen") for r in state.history] == [2, 4, None]
    assert [r["epoch"] for r in state.history] == [0, 1, 2]
    np.testing.assert_allclose(
        [r["loss"] for r in state.history], state.losses.reshape(3, 2).mean(1)
    )


@pytest.mark.parametrize(
    ("every", "steps"),
    [(None, [5, 10]), (1, [*range(1, 11)]), (2, [2, 4, 5, 7, 9, 10]), (4, [4, 5, 9, 10])],
)
def test_a_short_last_batch_belongs_to_its_chunk(every, steps):
    loss, params, dataset = make()
    state = jg.fit(
        loss, params, dataset, optax.sgd(0.1), epochs=2, batch_size=5, callback_every=every
    )
    assert [r["step"] for r in state.history] == steps
    chunks = np.split(state.losses, steps[:-1])
    np.testing.assert_allclose([r["loss"] for r in state.history], [c.mean() for c in chunks])


def test_a_chunk_compiles_once_whatever_the_number_of_epochs():
    traces = []
    loss, params, dataset = make()

    def counted(p, batch):
        traces.append(batch["x"].shape)
        return loss(p, batch)

    jg.fit(counted, params, dataset, optax.sgd(0.1), epochs=5, batch_size=5, key=KEY)
    assert set(traces) == {(5, 6), (2, 6)}
    assert len(traces) == len(set(traces))


@pytest.mark.parametrize("model", ["nnx", "equinox"])
def test_modules_train_as_they_are(model):
    _, _, dataset = make()
    if model == "nnx":
        params = MLP(6, (5,), 3, rngs=nnx.Rngs(0))
        call, head = lambda m, x: m(x), "head/**"
    else:
        params = eqx.nn.MLP(6, 3, 5, 1, key=KEY)
        head = "layers/1/**"
        call = lambda m, x: jax.vmap(m)(x)

    def loss(m, batch):
        logits = call(m, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    state = jg.fit(
        loss, params, dataset, jg.param_groups({head: optax.sgd(0.5)}), epochs=30, batch_size=11
    )
    assert type(state.params) is type(params)
    assert state.losses[-2:].mean() < state.losses[:2].mean()


def test_a_loss_that_is_no_number_is_named():
    def loss(p, batch):
        return p * jnp.log(batch["x"]).mean()

    dataset = {"x": jnp.ones(20).at[13].set(-1.0)}
    with pytest.raises(jg.NonFiniteLossError) as info:
        jg.fit(loss, jnp.array(1.0), dataset, optax.sgd(0.1), epochs=2, batch_size=4)
    assert str(info.value) == (
        "the loss is nan at step 3 (epoch 1, rows 12, 13, 14, 15 of the dataset). The loss before "
        "it was 0. Look at these rows, lower the learning rate, or clip the gradients "
        "(optax.clip_by_global_norm). The state before it is in .state, the rows are in .rows: "
        "jaxgrad.find_nonfinite(loss, error.state.params, batch) names the operation."
    )
    assert info.value.state.step == 3
    assert info.value.rows.tolist() == [12, 13, 14, 15]
    found = jg.find_nonfinite(loss, info.value.state.params, {"x": dataset["x"][info.value.rows]})
    assert found and found.operation.primitive == "log"
    assert info.value.state.params == 1.0


def test_steps_that_are_not_finite_are_skipped_within_a_bound():
    """The steps of rows below zero are no numbers; skipped, they leave what the others give."""

    def loss(p, batch):
        return p["w"] * jnp.log(batch["x"]).mean() + p["w"] ** 2

    x = jnp.arange(1.0, 13.0)
    run = lambda x, skip, every=None: jg.fit(
        loss,
        {"w": jnp.array(1.0)},
        {"x": x},
        optax.sgd(0.1, momentum=0.9),
        batch_size=2,
        max_nonfinite_steps=skip,
        callback_every=every,
    )
    bad = x.at[jnp.array([2, 5, 10])].set(-1.0)  # in the steps 1, 2 and 5 of six
    for every in (None, 1):
        state = run(bad, 2, every)
        assert np.isfinite(state.losses).tolist() == [True, False, False, True, True, False]
        good = run(jnp.concatenate([x[:2], x[6:10]]), 0)
        np.testing.assert_array_equal(state.params["w"], good.params["w"])
        np.testing.assert_array_equal(state.losses[np.isfinite(state.losses)], good.losses)
        with pytest.raises(
            jg.NonFiniteLossError, match=r"at step 2 .*after skipping 1 before"
        ) as info:
            run(bad, 1, every)
        assert info.value.state.step == len(info.value.state.losses) == 1
        np.testing.assert_array_equal(info.value.state.params["w"], run(x[:2], 0).params["w"])
    assert [r.get("skipped") for r in run(bad, 2).history] == [3]
    assert np.isfinite(run(bad, 2).history[0]["loss"])


def test_a_gradient_that_is_not_finite_ends_a_run_before_it_moves_anything():
    loss = lambda p, batch: jnp.sqrt(p * batch["x"]).mean()
    with pytest.raises(
        jg.NonFiniteLossError, match="a gradient is not finite, with loss 0"
    ) as info:
        jg.fit(loss, jnp.array(1.0), {"x": jnp.zeros(4)}, optax.sgd(0.1))
    assert info.value.state.params == 1.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 0}, "batch_size=0; it must be 1 or more."),
        ({"callback_every": -1}, "callback_every=-1; it must be 1 or more."),
        ({"stage": "always"}, "stage='always'; it must be 'auto', True, or False."),
        ({"max_nonfinite_steps": -1}, "max_nonfinite_steps=-1; it must be 0 or more."),
        ({"resume": True}, "resume=True needs the directory of the run: fit(..., checkpoint="),
        ({"epochs": -1}, "epochs=-1; it must be 0 or more."),
        (
            {
                "tx": optax.chain(
                    optax.clip_by_global_norm(1.0), jg.param_groups({"head/**": optax.sgd(0.1)})
                )
            },
            "tx has param_groups inside another transformation, which would read the gradients "
            "of what the groups freeze. Pass what they train: fit(..., wrt=groups.assign(",
        ),
        (
            {"dataset": {"x": np.ones(3), "y": np.ones(4)}},
            "the arrays of the dataset must have the same number of rows (axis 0): 'x' has 3 and "
            "'y' has 4.",
        ),
        ({"dataset": {"x": np.ones(0)}}, "the dataset has no rows: 'x' has shape [0]."),
        ({"dataset": {}}, "the same number of rows (axis 0): there are no arrays."),
    ],
)
def test_wrong_arguments(change, text):
    loss, params, dataset = make()
    with pytest.raises(ValueError) as info:  # noqa: PT011 - the text is compared below
        jg.fit(loss, params, **({"dataset": dataset, "tx": optax.sgd(0.1)} | change))
    assert text in str(info.value)


def test_no_epochs_change_nothing():
    loss, params, dataset = make()
    state = jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=0)
    assert state.step == 0 and state.losses.shape == (0,) and state.history == ()
    equal(state.params, params, rtol=0)


# The frozen part computed once.


@pytest.fixture
def eager_to_stage(monkeypatch):
    """Prices at which even the smallest model is worth staging."""
    monkeypatch.setattr("jaxgrad._staging.report._COMPILATION", 0.0)
    monkeypatch.setattr("jaxgrad._staging.report._STEP", 0.0)
    monkeypatch.setattr("jaxgrad._staging.min_cut.FLOPS_PER_BYTE", 1e-6)


@pytest.mark.parametrize("batch_size", [5, 11, 100])
def test_staged_and_unstaged_are_one_training(eager_to_stage, batch_size):
    loss, params, dataset = make()
    tx = jg.param_groups({"head/**": optax.sgd(0.1, momentum=0.9)})
    run = lambda stage: jg.fit(
        loss, params, dataset, tx, epochs=4, batch_size=batch_size, key=KEY, stage=stage
    )
    staged, unstaged = run(True), run(False)
    assert "the frozen part runs once per row" in staged.staging
    assert unstaged.staging == "nothing is staged"
    np.testing.assert_allclose(staged.losses, unstaged.losses, rtol=1e-5)
    equal(staged.params, unstaged.params, rtol=1e-5, atol=1e-7)
    equal(staged.params["layers"], params["layers"], rtol=0)
    assert jax.tree.structure(staged.opt_state) == jax.tree.structure(unstaged.opt_state)


def test_staged_with_a_key(eager_to_stage):
    loss, params, dataset = make()

    def noisy(params, batch, key):
        return loss(params, batch) + jax.random.normal(key) * params["head"]["bias"].sum()

    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    run = lambda stage: jg.fit(
        noisy, params, dataset, tx, epochs=2, batch_size=5, key=KEY, stage=stage
    )
    staged, unstaged = run(True), run(False)
    assert "the frozen part runs once per row" in staged.staging
    np.testing.assert_allclose(staged.losses, unstaged.losses, rtol=1e-5)
    equal(staged.params, unstaged.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [True, False])
def test_a_dataset_may_lack_a_part(eager_to_stage, stage):
    loss, params, dataset = make()
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    run = lambda dataset: jg.fit(loss, params, dataset, tx, epochs=3, batch_size=5, stage=stage)
    state = run(dataset | {"mask": None})
    assert ("runs once per row" in state.staging) == stage
    np.testing.assert_array_equal(state.losses, run(dataset).losses)


@pytest.mark.parametrize("model", ["nnx", "equinox"])
def test_modules_are_staged_as_they_are(eager_to_stage, model):
    _, _, dataset = make()
    if model == "nnx":
        params, call, head = MLP(6, (5,), 3, rngs=nnx.Rngs(0)), lambda m, x: m(x), "head/**"
    else:
        params = eqx.nn.MLP(6, 3, 5, 1, key=KEY)
        call, head = lambda m, x: jax.vmap(m)(x), "layers/1/**"

    def loss(m, batch):
        logits = call(m, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    tx = jg.param_groups({head: optax.sgd(0.5)})
    staged, unstaged = (
        jg.fit(loss, params, dataset, tx, epochs=2, batch_size=11, stage=stage)
        for stage in (True, False)
    )
    assert "the frozen part runs once per row" in staged.staging
    assert type(staged.params) is type(params)
    np.testing.assert_allclose(staged.losses, unstaged.losses, rtol=1e-5)


def test_what_is_not_staged_is_said_why(eager_to_stage, monkeypatch):
    loss, params, dataset = make()
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})

    def mixing(params, batch):
        return loss(params, batch | {"x": batch["x"] - batch["x"].mean(0, keepdims=True)})

    assert "nothing is staged: " in jg.fit(mixing, params, dataset, tx).staging
    assert jg.fit(loss, params, dataset, optax.sgd(0.1)).staging == "nothing is staged"
    monkeypatch.setattr("jaxgrad._staging.precompute._free", lambda host: 100)
    assert "there is not enough memory" in jg.fit(loss, params, dataset, tx, epochs=4).staging
    monkeypatch.setattr("jaxgrad._staging.report._COMPILATION", 1e10)
    assert "1 epoch of 22 rows would not pay" in jg.fit(loss, params, dataset, tx).staging


@pytest.mark.parametrize(
    ("dataset", "wrt", "why"),
    [
        (lambda data: iter([data]), "head", "the dataset is a stream"),
        (lambda data: data, "**", "no parameter is frozen"),
    ],
)
def test_staging_that_was_asked_for_is_done_or_refused(dataset, wrt, why):
    loss, params, data = make()
    run = lambda data, **more: jg.fit(loss, params, data, optax.sgd(0.1), **more, stage=True)
    assert "the frozen part runs once per row" in run(data, wrt="head").staging  # at a loss
    with pytest.raises(jg.StageError) as error:
        run(dataset(data), wrt=wrt)
    assert str(error.value) == (
        f"fit(..., stage=True) can't stage the loss: {why}. With stage='auto' it trains unstaged."
    )


def test_staging_that_was_asked_for_names_what_mixes_rows():
    loss, params, dataset = make()

    def mixing(params, batch):
        return loss(params, batch | {"x": batch["x"] - batch["x"].mean(0, keepdims=True)})

    with pytest.raises(jg.StageError, match=r"can't stage the loss: .*With stage='auto'"):
        jg.fit(mixing, params, dataset, optax.sgd(0.1), wrt="head", stage=True)


def test_staging_hides_no_error(eager_to_stage):
    class Counting(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(5, 1, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))

    def loss(m, batch):
        return m.head(m.layer(m.norm(batch["x"]))).mean()

    _, _, dataset = make()
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    with pytest.raises(jg.GradientError, match="the loss changes 'norm/mean', 'norm/var'"):
        jg.fit(loss, Counting(), dataset, tx)


def test_progress_on_a_terminal(monkeypatch, capsys):
    loss, params, dataset = make()
    jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=2)
    assert capsys.readouterr().err == ""  # no terminal, no bar
    monkeypatch.setenv("FORCE_COLOR", "1")
    jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=2)
    shown = capsys.readouterr().err
    assert "epoch 2  loss" in shown and "rows/s" in shown
    jg.fit(loss, params, dataset, optax.sgd(0.1), epochs=2, progress=False)
    assert capsys.readouterr().err == ""
