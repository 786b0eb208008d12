"""State that follows its leaf: the moves of a resumed run against leaves trained each on its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg

PARAMS = {"body": jnp.full((4, 3), 0.5), "head": jnp.full(2, 1.0), "trunk": jnp.full(3, 2.0)}
DATA = 1 + jnp.arange(8.0) / 8
STEPS = 5


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(p, b):
    """Each leaf has gradients of its own, whatever the others do."""
    return jnp.mean(b) * sum((leaf**2).sum() + leaf.sum() for leaf in jax.tree.leaves(p))


def fit(tx, steps, run=None, **options):
    return jg.fit(
        loss,
        PARAMS,
        DATA,
        tx,
        epochs=steps,
        batch_size=8,
        checkpoint=run and jg.Checkpoints(run, every=100),
        **options,
    )


def alone(make, name, steps):
    """A leaf after so many steps of an optimizer of its own."""
    part = {name: PARAMS[name]}
    tx = optax.with_extra_args_support(make())
    state = tx.init(part)
    for _ in range(steps):
        grads = jax.grad(loss)(part, DATA)
        updates, state = tx.update(grads, state, part)
        part = optax.apply_updates(part, updates)
    return part[name]


OPTIMIZERS = {
    "warm-up": lambda: optax.sgd(optax.linear_schedule(0.0, 0.1, 20)),
    "momentum": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    "adamw, cosine": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 20), weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=2),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
    "sm3": lambda: optax.sm3(0.01),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0, 0.1, 20)),
    "clipped and averaged": lambda: optax.chain(
        optax.clip(1.0), optax.adam(0.01), jg.params_ema(0.9)
    ),
    "masked": lambda: optax.masked(optax.adam(0.01), lambda p: jax.tree.map(lambda _: True, p)),
    "finite only": lambda: optax.apply_if_finite(optax.adam(0.01), 3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("order", [["trunk", "head", "body"], ["body", "trunk", "head"]])
def test_groups_in_another_order_with_a_new_one(tmp_path, optimizer, order):
    make = OPTIMIZERS[optimizer]
    groups = lambda names: jg.param_groups({name: make() for name in names})
    fit(groups(["body", "head"]), STEPS, tmp_path / "run")
    state = fit(groups(order), 2 * STEPS, tmp_path / "run", resume=True)
    assert "0 dropped" in state.resumed and "go" not in state.resumed, state.resumed
    for name, steps in (("body", 2 * STEPS), ("head", 2 * STEPS), ("trunk", STEPS)):
        np.testing.assert_allclose(state.params[name], alone(make, name, steps), rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_leaves_in_more_groups_or_fewer(tmp_path, optimizer):
    make = OPTIMIZERS[optimizer]
    forms = {
        "none": lambda: (make(), ["body", "head"]),
        "one": lambda: (jg.param_groups([(["head", "body"], make())]), None),
        "two": lambda: (jg.param_groups({"head": make(), "body": make()}), None),
    }
    for i, (before, after) in enumerate(itertools.permutations(forms, 2)):
        run = tmp_path / str(i)
        for form, steps in ((before, STEPS), (after, 2 * STEPS)):
            tx, wrt = forms[form]()
            state = fit(tx, steps, run, wrt=wrt, resume=steps > STEPS)
        assert " 0 added" in state.resumed or state.resumed == f"resumed at step {STEPS}"
        assert "was" not in state.resumed and "go" not in state.resumed, state.resumed
        for name in ("body", "head"):
            got, want = state.params[name], alone(make, name, 2 * STEPS)
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{before} to {after}")


AROUND = {
    "clip": lambda tx: optax.chain(optax.clip(1e9), tx),
    "clip by norm": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "average": lambda tx: optax.chain(tx, jg.params_ema(0.9)),
    "both": lambda tx: optax.chain(optax.clip(1e9), optax.chain(tx, jg.params_ema(0.9))),
    "finite only": lambda tx: optax.apply_if_finite(tx, 3),
    "group": lambda tx: jg.param_groups([(["body", "head"], tx)]),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "extra arguments": lambda tx: optax.with_extra_args_support(tx),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("optimizer", ["warm-up", "adam", "momentum", "adamw, cosine"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_stands_around_is_added_or_removed(tmp_path, around, optimizer, inside):
    make = OPTIMIZERS[optimizer]
    plain = jg.param_groups({"body": make(), "head": make()}) if inside else make()
    more = AROUND[around](plain)
    for i, pair in enumerate([(plain, more), (more, plain)]):
        for tx, steps in zip(pair, (STEPS, 2 * STEPS), strict=True):
            options = {"wrt": ["body", "head"], "resume": steps > STEPS}
            state = fit(tx, steps, tmp_path / str(i), **options)
        for name in ("body", "head"):
            got, want = state.params[name], alone(make, name, 2 * STEPS)
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=state.resumed)


@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_average_counts_the_steps_of_its_leaf(tmp_path, decay, grouped):
    seen = []
    see = lambda state: seen.append({k: np.asarray(v) for k, v in state.params.items()})
    for wrt, steps in ((["head"], 3), (["head", "trunk"], 7)):
        tx = optax.chain(optax.sgd(0.01), jg.params_ema(decay))
        tx = jg.param_groups([(wrt, tx)]) if grouped else tx
        options = {"wrt": wrt, "resume": steps > 3, "callbacks": [see]}
        state = fit(tx, steps, tmp_path / "run", **options)
    average = jg.averaged_params(state.params, state.opt_state)
    for name, own in (("head", seen), ("trunk", seen[3:])):
        weights = decay ** np.arange(len(own) - 1, -1, -1.0)
        want = sum(w * p[name] for w, p in zip(weights, own, strict=True)) / weights.sum()
        np.testing.assert_allclose(average[name], want, rtol=1e-5)


# What can't be kept is said.


def resumed(tmp_path, *forms, steps=(STEPS, 2 * STEPS)):
    for i, ((tx, wrt), n) in enumerate(zip(forms, steps, strict=True)):
        state = fit(tx, n, tmp_path / "run", wrt=wrt, resume=i > 0)
    return state


def test_a_new_leaf_that_joins_a_counter(tmp_path):
    tx = lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 20))
    state = resumed(tmp_path, (tx(), ["head"]), (tx(), ["head", "trunk"]))
    assert state.resumed == (
        "resumed at step 5; newly trained: 'trunk'; of the optimizer's state 4 arrays kept, 2 "
        "added (ScaleByAdamState.mu, ScaleByAdamState.nu), 0 dropped; 'trunk' goes on from "
        "ScaleByAdamState.count = 5, ScaleByScheduleState.count = 5 of 'head', so the first steps "
        "are not those of a new run: for that, use a group of its own in param_groups"
    )
    again = fit(tx(), 11, tmp_path / "run", wrt=["head", "trunk"], resume=True)
    assert again.resumed == "resumed at step 10"


def test_counters_that_are_one_now(tmp_path):
    adam = lambda: optax.adam(0.01)
    state = resumed(
        tmp_path,
        (jg.param_groups({"head": adam()}), None),
        (jg.param_groups({"body": adam(), "head": adam()}), None),
        (adam(), ["body", "head"]),
        steps=(5, 7, 8),
    )
    assert state.resumed == (
        "resumed at step 7; of the optimizer's state 5 arrays kept, 0 added, 0 dropped; "
        "ScaleByAdamState.count was 2 for 'body' and 7 for 'head', and is one for all now, that of "
        "'head': to keep each, keep their groups apart"
    )


def test_another_optimizer(tmp_path):
    state = resumed(tmp_path, (optax.adam(0.1), ["head"]), (optax.sgd(0.1, momentum=0.9), ["head"]))
    assert state.resumed == (
        "resumed at step 5; of the optimizer's state 0 arrays kept, 1 added (TraceState.trace), 3 "
        "dropped (ScaleByAdamState.count, ScaleByAdamState.mu, ScaleByAdamState.nu)"
    )


def test_a_leaf_that_is_frozen_and_trained_again_starts_anew(tmp_path):
    adam = lambda: optax.adam(0.01)
    both = lambda: (jg.param_groups({"head": adam(), "trunk": adam()}), None)
    head = (jg.param_groups({"head": adam()}), None)
    state = resumed(tmp_path, both(), head, both(), steps=(3, 6, 7))
    moved = np.asarray(alone(adam, "trunk", 3) - state.params["trunk"])
    np.testing.assert_allclose(moved, np.full(3, 0.01), rtol=1e-3)
    np.testing.assert_allclose(state.params["head"], alone(adam, "head", 7), rtol=1e-5)


@pytest.mark.parametrize("container", [list, tuple, lambda xs: xs[1]])
def test_parameters_in_other_containers(tmp_path, container):
    params = container([jnp.ones((3, 2)), jnp.ones(2)])
    tx = lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 20))
    run = lambda tx, steps, **options: jg.fit(
        loss, params, DATA, tx, epochs=steps, batch_size=8, **options
    )
    whole = run(tx(), 8)
    run(tx(), 4, checkpoint=tmp_path / "run")
    clipped = optax.chain(optax.clip(1e9), tx())
    state = run(clipped, 8, checkpoint=tmp_path / "run", resume=True)
    assert state.resumed == "resumed at step 4"
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


def test_several_arrays_of_one_kind_keep_their_order(tmp_path):
    chain = lambda *more: optax.chain(*more, optax.trace(0.9), optax.trace(0.5), optax.scale(-0.01))
    fit(chain(), STEPS, tmp_path / "run", wrt=["head"])
    state = fit(chain(optax.clip(1e9)), 2 * STEPS, tmp_path / "run", wrt=["head"], resume=True)
    np.testing.assert_allclose(state.params["head"], alone(chain, "head", 2 * STEPS), rtol=1e-6)
