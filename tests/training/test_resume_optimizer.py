"""State that follows its leaf: a resumed run against each leaf trained on its own.

Most runs here are loops without `fit`, which would compile several hundred of them.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad._checkpoint.record import Settings, StepRecord
from jaxgrad._checkpoint.run import Saved
from jaxgrad._optim.param_groups import ParamGroups
from jaxgrad._optim.parts import parts_of
from jaxgrad._training.resume_optimizer import restore_opt_state

PARAMS = {"body": jnp.full((4, 3), 0.5), "head": jnp.full(2, 1.0), "trunk": jnp.full(3, 2.0)}
DATA = 1 + jnp.arange(8.0) / 8
STEPS = 5


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


@jax.jit
def loss(p, b):
    """Each leaf has gradients of its own, whatever the others do."""
    return jnp.mean(b) * sum((leaf**2).sum() + leaf.sum() for leaf in jax.tree.leaves(p))


class Phase(NamedTuple):
    """Where a run stands after some steps, and what it saved."""

    params: Any
    saved: Saved
    resumed: str


def phase(tx, steps, before=None, wrt="**", params=PARAMS):
    """Trains up to that step, from the start or from a phase before."""
    line, done, params = "", 0, params if before is None else before.params
    wrt = tx.assign(params).wrt if isinstance(tx, ParamGroups) else wrt
    half, rest = jg.partition(params, wrt)
    state = tx.init(half)
    if before:
        done = before.saved.record.step
        state, line = restore_opt_state(before.saved, state, half)
    update = optax.with_extra_args_support(tx).update
    for _ in range(steps - done):
        updates, state = update(jax.grad(loss)(half, DATA), state, half)
        half = jg.apply_updates(half, updates)
    record = StepRecord(
        step=steps,
        settings=Settings(),
        staged=None,
        positions=(),
        trained=tuple(jg.paths(half)),
        parts=parts_of(state, half),
    )
    arrays = dict(zip(jg.paths(state), jax.tree.leaves(state), strict=True))
    saved = Saved({}, arrays, {}, np.zeros(steps), {}, record)
    return Phase(jg.merge(half, rest), saved, line)


@functools.lru_cache
def alone(make, name, steps):
    """A leaf after so many steps of an optimizer of its own."""
    part = {name: PARAMS[name]}
    tx = optax.with_extra_args_support(make())
    state = tx.init(part)
    update = tx.update
    for _ in range(steps):
        updates, state = update(jax.grad(loss)(part, DATA), state, part)
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
def test_groups_in_another_order_with_a_new_one(optimizer):
    make = OPTIMIZERS[optimizer]
    groups = lambda names: jg.param_groups({name: make() for name in names})
    first = phase(groups(["body", "head"]), STEPS)
    for order in (["trunk", "head", "body"], ["body", "trunk", "head"]):
        then = phase(groups(order), 2 * STEPS, first)
        assert " 0 dropped" in then.resumed and " go" not in then.resumed, then.resumed
        for name, steps in (("body", 2 * STEPS), ("head", 2 * STEPS), ("trunk", STEPS)):
            np.testing.assert_allclose(then.params[name], alone(make, name, steps), rtol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_leaves_in_more_groups_or_fewer(optimizer):
    make, wrt = OPTIMIZERS[optimizer], ["body", "head"]
    forms = {
        "none": make(),
        "one": jg.param_groups([(wrt, make())]),
        "two": jg.param_groups({"head": make(), "body": make()}),
    }
    firsts = {form: phase(tx, STEPS, wrt=wrt) for form, tx in forms.items()}
    for before, after in itertools.permutations(forms, 2):
        then = phase(forms[after], 2 * STEPS, firsts[before], wrt)
        assert " 0 added" in then.resumed or then.resumed == f"resumed at step {STEPS}"
        assert " was " not in then.resumed and " go" not in then.resumed, then.resumed
        for name in wrt:
            got, want = then.params[name], alone(make, name, 2 * STEPS)
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{before} to {after}")


AROUND = {
    "clip": lambda tx: optax.chain(optax.clip(1e9), tx),
    "clip by norm": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
    "average": lambda tx: optax.chain(tx, jg.params_ema(0.9)),
    "both": lambda tx: optax.chain(optax.clip(1e9), optax.chain(tx, jg.params_ema(0.9))),
    "finite only": lambda tx: optax.apply_if_finite(tx, 3),
    "group": lambda tx: jg.param_groups([(["body", "head"], tx)]),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("optimizer", ["warm-up", "adamw, cosine", "momentum"])
def test_what_stands_around_is_added_or_removed(around, optimizer):
    make, wrt = OPTIMIZERS[optimizer], ["body", "head"]
    for plain in (make(), jg.param_groups({"body": make(), "head": make()})):
        more = AROUND[around](plain)
        for before, after in ((plain, more), (more, plain)):
            then = phase(after, 2 * STEPS, phase(before, STEPS, wrt=wrt), wrt)
            for name in wrt:
                got, want = then.params[name], alone(make, name, 2 * STEPS)
                np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=then.resumed)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_average_counts_the_steps_of_its_leaf(tmp_path, grouped):
    seen, decay = [], 0.9
    see = lambda state: seen.append({k: np.asarray(v) for k, v in state.params.items()})
    for wrt, steps in ((["head"], 3), (["head", "trunk"], 7)):
        tx = optax.chain(optax.sgd(0.01), jg.params_ema(decay))
        tx = jg.param_groups([(wrt, tx)]) if grouped else tx
        options = {"wrt": wrt, "resume": steps > 3, "callbacks": [see], "epochs": steps}
        run = tmp_path / "run"
        state = jg.fit(loss, PARAMS, DATA, tx, batch_size=8, checkpoint=run, **options)
    average = jg.averaged_params(state.params, state.opt_state)
    for name, own in (("head", seen), ("trunk", seen[3:])):
        weights = decay ** np.arange(len(own) - 1, -1, -1.0)
        want = sum(w * p[name] for w, p in zip(weights, own, strict=True)) / weights.sum()
        np.testing.assert_allclose(average[name], want, rtol=1e-5)


# What can't be kept is said.


def test_a_new_leaf_that_joins_a_counter(tmp_path):
    def fit(wrt, steps, **options):
        tx = optax.adam(optax.linear_schedule(0.1, 0.0, 20))
        options = {"epochs": steps, "wrt": wrt, "checkpoint": tmp_path / "run"} | options
        return jg.fit(loss, PARAMS, DATA, tx, batch_size=8, **options)

    fit(["head"], 5)
    assert fit(["head", "trunk"], 10, resume=True).resumed == (
        "resumed at step 5; newly trained: 'trunk'; optimizer state: 4 arrays kept, 2 "
        "added (ScaleByAdamState.mu, ScaleByAdamState.nu), 0 dropped; 'trunk' goes on from "
        "ScaleByAdamState.count = 5, ScaleByScheduleState.count = 5 of 'head', so the first steps "
        "are not those of a new run: for that, use a group of its own in param_groups"
    )
    assert fit(["head", "trunk"], 11, resume=True).resumed == "resumed at step 10"


def adam():
    return optax.adam(0.01)


def test_counters_that_are_one_now():
    head = phase(jg.param_groups({"head": adam()}), 5)
    both = phase(jg.param_groups({"body": adam(), "head": adam()}), 7, head)
    assert phase(adam(), 8, both, ["body", "head"]).resumed == (
        "resumed at step 7; ScaleByAdamState.count was 2 for 'body' and 7 for 'head', and is one "
        "for all now, that of 'head': to keep each, keep their groups apart"
    )


def test_an_injected_hyperparameter_that_the_call_changes():
    first = phase(optax.inject_hyperparams(optax.sgd)(0.01, momentum=0.5), 5)
    then = phase(optax.inject_hyperparams(optax.sgd)(0.001, momentum=0.5), 7, first)
    assert then.resumed == (
        "resumed at step 5; learning_rate goes on at 0.01, the run's, and not at this call's "
        "0.001: to change it, use no inject_hyperparams"
    )
    plain = phase(optax.sgd(0.001, momentum=0.5), 7, first)
    assert "3 arrays kept, 0 added, 3 dropped (Inject" in plain.resumed
    assert (plain.params["head"] > then.params["head"]).all()


def test_another_optimizer():
    then = phase(optax.sgd(0.1, momentum=0.9), 7, phase(adam(), 5, wrt="head"), "head")
    assert then.resumed == (
        "resumed at step 5; optimizer state: 0 arrays kept, 1 added (TraceState.trace), 3 "
        "dropped (ScaleByAdamState.count, ScaleByAdamState.mu, ScaleByAdamState.nu)"
    )


def test_a_leaf_that_is_frozen_and_trained_again_starts_anew():
    both = lambda: jg.param_groups({"head": adam(), "trunk": adam()})
    first = phase(both(), 3)
    last = phase(both(), 7, phase(jg.param_groups({"head": adam()}), 6, first))
    moved = np.asarray(alone(adam, "trunk", 3) - last.params["trunk"])
    np.testing.assert_allclose(moved, np.full(3, 0.01), rtol=1e-3)
    np.testing.assert_allclose(last.params["head"], alone(adam, "head", 7), rtol=1e-5)


@pytest.mark.parametrize("make", [list, tuple, lambda xs: xs[1], lambda xs: {"a": {"b": xs}}])
def test_parameters_in_other_containers(make):
    params = make([jnp.ones((3, 2)), jnp.ones(2)])
    tx = lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 20))
    clipped = optax.chain(optax.clip(1e9), tx())
    then = phase(clipped, 8, phase(tx(), 4, params=params))
    assert then.resumed == "resumed at step 4"
    want = phase(tx(), 8, params=params).params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), then.params, want)


def test_several_arrays_of_one_kind_keep_their_order():
    chain = lambda *more: optax.chain(*more, optax.trace(0.9), optax.trace(0.5), optax.scale(-0.01))
    then = phase(chain(optax.clip(1e9)), 10, phase(chain(), 5, wrt="head"), "head")
    np.testing.assert_allclose(then.params["head"], alone(chain, "head", 10), rtol=1e-6)


def test_labels_of_partition_stay_apart():
    warm = lambda: optax.sgd(optax.linear_schedule(0.0, 0.1, 20))
    labels = {"body": "x", "head": "y", "trunk": "x"}
    tx = lambda: optax.partition({"x": warm(), "y": optax.adam(0.01)}, labels)
    then = phase(optax.chain(optax.clip(1e9), tx()), 10, phase(tx(), 5))
    assert then.resumed == "resumed at step 5"
    for name, make in (("body", warm), ("head", adam)):
        np.testing.assert_allclose(then.params[name], alone(make, name, 10), rtol=1e-5)
