import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgrad as jg


@pytest.fixture(autouse=True)
def optax_promotes():
    """Adam's bias correction and others of Optax's own steps don't hold under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# What a frozen leaf may hold: both zeros, a subnormal number, the ends of the range, no number.
AWKWARD = np.array([-0.0, 0.0, 1e-40, -3e38, np.inf, np.nan, 1e-3, 7.0], np.float32)


def make_params():
    key = jax.random.key(0)
    return {
        "trunk": {"kernel": jnp.asarray(np.tile(AWKWARD, (8, 1))), "bias": jnp.asarray(AWKWARD)},
        "head": {"kernel": jax.random.normal(key, (8, 8)), "bias": jnp.ones(8)},
    }


def bits(tree):
    return [np.asarray(leaf).view(np.uint32).tolist() for leaf in jax.tree.leaves(tree)]


def loss(params, x):
    """Finite, with gradients for all leaves that are not all zero."""
    tame = lambda leaf: jnp.clip(jnp.nan_to_num(leaf), -1, 1)  # sums of -3e38 overflow
    h = jnp.tanh(x @ tame(params["trunk"]["kernel"]))
    h = h + tame(params["trunk"]["bias"])[None]
    return jnp.mean((jnp.tanh(h) @ params["head"]["kernel"] + params["head"]["bias"][None]) ** 2)


# Small: sums of -3e38 must not overflow in whatever order a processor adds.
X = 0.05 * jax.random.normal(jax.random.key(1), (4, 8))

OPTIMIZERS = {
    "sgd": optax.sgd(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "nesterov": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "rmsprop": optax.rmsprop(1e-2, momentum=0.9),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
}
RECIPES = {
    "alone": lambda tx: tx,
    "clip by norm": lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
    "clip": lambda tx: optax.chain(optax.clip(0.1), tx),
    "decay": lambda tx: optax.chain(tx, optax.add_decayed_weights(1e-2)),
    "noise": lambda tx: optax.chain(tx, optax.add_noise(0.1, 0.5, jax.random.key(0))),
    "apply if finite": lambda tx: optax.apply_if_finite(tx, 3),
    "multi steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


def train(tx, params, grad, steps=4, halved=True, apply=jg.apply_updates):
    half = jg.partition(params, "head/**")[0] if halved else params
    state = tx.init(half)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            grad(params, X),
            state,
            jg.partition(params, "head/**")[0] if halved else params,
        )
        return apply(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_is_frozen(optimizer, recipe):
    params = make_params()
    tx = RECIPES[recipe](jg.param_groups({"head/**": OPTIMIZERS[optimizer]}))
    trained, state = train(tx, params, jg.grad(loss, wrt="head/**"))
    assert bits(trained["trunk"]) == bits(params["trunk"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trained["head"]))
    moved = [a != b for a, b in zip(bits(trained["head"]), bits(params["head"]), strict=True)]
    assert all(moved)
    assert not [path for path in jg.paths(state) if "trunk" in path]


@pytest.mark.parametrize("recipe", ["alone", "inside"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_is_frozen_with_gradients_for_all(optimizer, recipe):
    params = make_params()
    inner = OPTIMIZERS[optimizer]
    if recipe == "inside":
        inner = optax.chain(optax.clip_by_global_norm(0.1), inner, optax.add_decayed_weights(1e-2))
    tx = jg.param_groups({"head/**": inner})
    everything, state = train(tx, params, jax.grad(loss), halved=False)
    selected, _ = train(tx, params, jg.grad(loss, wrt="head/**"))
    assert bits(everything["trunk"]) == bits(params["trunk"])
    # The frozen gradients have no share in the norm: the head takes the very same steps.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        everything["head"],
        selected["head"],
    )
    assert not [path for path in jg.paths(state) if "trunk" in path]


def test_plain_optax_apply_updates_is_safe_for_all_but_subnormal_numbers():
    params = make_params()
    tx = jg.param_groups({"head/**": optax.adamw(1e-2)})
    trained, _ = train(tx, params, jax.grad(loss), halved=False, apply=optax.apply_updates)
    for before, after in zip(bits(params["trunk"]), bits(trained["trunk"]), strict=True):
        normal = np.asarray(before) != AWKWARD[2].view(np.uint32)
        np.testing.assert_array_equal(np.asarray(before)[normal], np.asarray(after)[normal])


def test_the_trap_is_real():
    """What `param_groups` is for: the same recipe in plain Optax moves the frozen weights."""
    params = {"head": jnp.ones(2), "trunk": jnp.ones(2)}
    mask = {"head": False, "trunk": True}
    tx = optax.chain(optax.masked(optax.set_to_zero(), mask), optax.adamw(1e-2, weight_decay=0.1))
    grads = {"head": jnp.ones(2), "trunk": jnp.ones(2)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert (updates["trunk"] != 0).all()


def test_groups_follow_their_own_transformations():
    params = {"head": jnp.ones(2), "body": jnp.ones(2), "trunk": jnp.ones(2)}
    tx = jg.param_groups({"head": optax.sgd(1.0), "[hb]*": optax.sgd(0.1)})
    grads = {"head": jnp.ones(2), "body": jnp.ones(2), "trunk": None}
    updates, _ = tx.update(grads, tx.init(params), None)
    np.testing.assert_allclose(updates["head"], [-1.0, -1.0])  # the first match wins
    np.testing.assert_allclose(updates["body"], [-0.1, -0.1])
    assert updates["trunk"] is None


def test_groups_by_any_wrt():
    params = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "c": jnp.ones(2), "d": jnp.ones(2)}
    tx = jg.param_groups(
        [
            (["a", "d"], optax.sgd(1.0)),
            (lambda path, leaf: leaf.ndim == 2, optax.sgd(0.1)),
            ({"a": False, "b": False, "c": True, "d": True}, optax.sgd(0.01)),
        ]
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    rates = {"a": 1.0, "b": 0.1, "c": 0.01, "d": 1.0}
    jax.tree.map(lambda u, r: np.testing.assert_allclose(u, np.full(u.shape, -r)), updates, rates)


def test_readme_protocol_where_a_group_is_all_holes():
    params = make_params()
    tx = jg.param_groups({"head/**": optax.adam(1e-2), "trunk/**": optax.adam(1e-2)})
    trained, _ = train(tx, params, jg.grad(loss, wrt="head/**"))
    assert bits(trained["trunk"]) == bits(params["trunk"])
    assert bits(trained["head"]) != bits(params["head"])


def test_clipping_over_groups_by_nesting():
    params = {"head": jnp.zeros(2), "body": jnp.zeros(2), "trunk": jnp.zeros(2)}
    inner = jg.param_groups({"head": optax.sgd(1.0), "body": optax.sgd(10.0)})
    tx = jg.param_groups({"!trunk": optax.chain(optax.clip_by_global_norm(1.0), inner)})
    grads = {
        "head": jnp.array([3.0, 0.0]),
        "body": jnp.array([0.0, 4.0]),
        "trunk": jnp.full(2, 9.0),
    }
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["head"], [-0.6, 0.0])
    np.testing.assert_allclose(updates["body"], [0.0, -8.0])
    assert (updates["trunk"] == 0).all() and np.signbit(updates["trunk"]).all()


def test_schedules_and_injected_hyperparameters():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5, 2: 0.1})
    params = {"head": jnp.zeros(()), "trunk": jnp.zeros(())}
    grads = {"head": jnp.ones(()), "trunk": None}
    inside = jg.param_groups({"head": optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)})
    around = optax.inject_hyperparams(lambda lr: jg.param_groups({"head": optax.sgd(lr)}))(
        lr=schedule
    )
    for tx in (inside, around, jg.param_groups({"head": optax.sgd(schedule)})):
        state, steps = tx.init(params), []
        for _ in range(3):
            updates, state = jax.jit(tx.update)(grads, state)
            steps.append(float(updates["head"]))
        np.testing.assert_allclose(steps, [-1.0, -0.5, -0.05], rtol=1e-6)


def test_multi_steps_accumulates_the_selected_leaves_only():
    params = make_params()
    tx = optax.MultiSteps(jg.param_groups({"head/**": optax.sgd(1.0)}), 2)
    trainable, _ = jg.partition(params, "head/**")
    state = tx.init(trainable)
    assert jg.paths(state.acc_grads) == ["head/bias", "head/kernel"]
    grads = jg.grad(loss, wrt="head/**")(params, X)
    updates, state = tx.update(grads, state, trainable)
    assert not updates["head"]["bias"].any()
    updates, state = tx.update(jax.tree.map(lambda g: 3 * g, grads), state, trainable)
    np.testing.assert_allclose(updates["head"]["bias"], -2 * grads["head"]["bias"], rtol=1e-6)


def test_extra_arguments_reach_the_groups():
    tx = jg.param_groups({"a": optax.contrib.reduce_on_plateau(patience=0), "b": optax.sgd(1.0)})
    params = {"a": jnp.ones(()), "b": jnp.ones(()), "c": jnp.ones(())}
    grads = {"a": jnp.ones(()), "b": jnp.ones(()), "c": None}
    state = tx.init(params)
    for value in (1.0, 1.0, 1.0):
        updates, state = tx.update(grads, state, params, value=jnp.array(value))
    assert float(updates["a"]) < 1 and updates["b"] == -1


def test_same_steps_as_the_plain_optimizer_on_the_trained_leaves():
    params = make_params()
    plain = optax.adamw(1e-2)
    head, state = params["head"], plain.init(params["head"])
    for _ in range(4):
        grads = jax.grad(lambda h: loss(params | {"head": h}, X))(head)
        updates, state = plain.update(grads, state, head)
        head = optax.apply_updates(head, updates)
    trained, _ = train(
        jg.param_groups({"head/**": optax.adamw(1e-2)}), params, jg.grad(loss, wrt="head/**")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trained["head"], head)


shapes = st.sampled_from([(), (3,), (2, 2)])


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefg"), shapes, min_size=2), st.data())
def test_any_assignment_moves_exactly_the_groups(tree, data):
    params = {name: jnp.ones(shape) for name, shape in tree.items()}
    rates = {
        name: data.draw(st.sampled_from([0.5, 0.25]))
        for name in data.draw(st.sets(st.sampled_from(sorted(tree)), min_size=1))
    }
    tx = jg.param_groups({name: optax.sgd(rate) for name, rate in rates.items()})
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = jg.apply_updates(params, updates)
    assert {name: float(np.max(leaf)) for name, leaf in new.items()} == {
        name: 1 - rates.get(name, 0.0) for name in tree
    }


# Others' code that knows no holes.


@pytest.mark.parametrize("names", [["head"], ["head", "bias"]])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_train_state_of_flax_takes_gradients_with_holes(names, compiled):
    params = {"trunk": jnp.full((2, 2), -0.0), "head": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = jg.param_groups({name: optax.adam(1e-2) for name in names})
    loss = lambda p: jnp.sum((p["head"] @ p["trunk"] + p["bias"][None] + p["head"]) ** 2)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    apply = lambda state, grads: state.apply_gradients(grads=grads)
    apply = jax.jit(apply) if compiled else apply
    half = full = state
    for _ in range(3):
        half = apply(half, jg.grad(loss, names)(half.params))
        full = apply(full, jax.grad(loss)(full.params))
    jax.tree.map(np.testing.assert_array_equal, half.params, full.params)
    frozen = {name: x for name, x in params.items() if name not in names}
    assert bits({name: half.params[name] for name in frozen}) == bits(frozen)
    assert serialization.from_bytes(half, serialization.to_bytes(half)).step == 3


def test_holes_stay_holes_where_the_caller_knows_them():
    tx = jg.param_groups({"head": optax.sgd(1.0)})
    params, half = {"head": jnp.ones(2), "n": jnp.ones(2)}, {"head": jnp.ones(2), "n": None}
    for first, then in ((half, half), (half, params), (params, half), (params, None)):
        assert tx.update(half, tx.init(first), then)[0]["n"] is None
    keys = {**params, "n": jax.random.key(0)}
    assert tx.update(half, tx.init(keys), keys)[0]["n"] is None


PARTS = {"trunk": jnp.ones((4, 4)), "head": jnp.eye(4, 2), "bias": jnp.zeros(2)}


def of_parts(p, x):
    return jnp.mean((jnp.tanh(x @ p["trunk"]) @ p["head"] + p["bias"][None] - 1.0) ** 2)


def test_what_cannot_take_holes_is_named_with_the_cure():
    galore, x = optax.contrib.galore(1e-2), jax.random.normal(jax.random.key(0), (8, 4))
    why = (
        " can't take a tree with holes (None for a leaf that it does not train), and there is one "
        "at 'bias', 'trunk': AttributeError: 'NoneType' object has no attribute 'dtype'. Show it "
        "optax.MaskedNode instead: optax.masked(tx, jaxgrad.select(params, wrt).mask), with what "
        "it trains as wrt."
    )
    fit = lambda tx, wrt=None: jg.fit(of_parts, PARTS, x, tx, wrt=wrt, epochs=3, batch_size=8)
    with pytest.raises(jg.UpdateError) as info:
        fit(galore, "head")
    assert str(info.value) == "tx" + why
    with pytest.raises(jg.UpdateError) as info:
        fit(jg.param_groups({"head": galore}))
    assert str(info.value) == "the group 'head'" + why
    head = {"head": PARTS["head"]}
    state = galore.init(head)
    for _ in range(3):
        grads = jax.grad(lambda h: of_parts({**PARTS, **h}, x))(head)
        updates, state = galore.update(grads, state, head)
        head = optax.apply_updates(head, updates)
    masked = optax.masked(galore, jg.select(PARTS, "head").mask)
    for new in (fit(masked, "head"), fit(jg.param_groups({"head": masked}))):
        np.testing.assert_allclose(new.params["head"], head["head"], rtol=1e-6)
        assert bits(new.params["trunk"]) == bits(PARTS["trunk"])


def test_other_errors_pass_unexplained():
    def refuse(*args):
        raise ValueError("as it likes")

    for tx in (
        optax.GradientTransformation(refuse, refuse),
        optax.GradientTransformation(lambda p: (), refuse),
    ):
        for run in (
            lambda: jg.fit(of_parts, PARTS, jnp.ones((8, 4)), tx, wrt="head"),  # noqa: B023
            lambda: jg.fit(of_parts, PARTS, jnp.ones((8, 4)), jg.param_groups({"head": tx})),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="as it likes"):
                run()


# The listing.


def test_assignment_lists_everything():
    params = make_params()
    tx = jg.param_groups({"head/kernel": optax.sgd(1.0), "head/**": optax.sgd(0.1)})
    assignment = tx.assign(params)
    assert repr(assignment).splitlines() == [
        "head/kernel: 1 leaf, 64 elements, 256 B",
        "  head/kernel  float32[8,8]",
        "head/**: 1 leaf, 8 elements, 32 B",
        "  head/bias  float32[8]",
        "frozen: 2 leaves, 72 elements, 288 B",
        "  trunk/bias    float32[8]",
        "  trunk/kernel  float32[8,8]",
    ]
    assert jg.paths(jg.partition(params, assignment.wrt)[0]) == ["head/bias", "head/kernel"]
    assert repr(tx) == "<param_groups head/kernel, head/**; everything else frozen>"
    unnamed = jg.param_groups([(lambda p, x: True, optax.sgd(1.0))])
    assert repr(unnamed) == "<param_groups group 0, by a predicate; everything else frozen>"


# Errors.


def error_of(fun, *args, error: type[Exception] = jg.UpdateError):
    with pytest.raises(error) as info:
        fun(*args)
    return str(info.value)


PARAMS = {"head": jnp.ones(2), "trunk": jnp.ones(3)}
GRADS = {"head": jnp.ones(2), "trunk": None}


def test_a_group_that_matches_nothing():
    tx = jg.param_groups({"haed": optax.sgd(1.0)})
    assert "Did you mean 'head'?" in error_of(tx.init, PARAMS, error=jg.SelectionError)


def test_a_group_that_others_leave_empty():
    tx = jg.param_groups({"**": optax.sgd(1.0), "head": optax.sgd(1.0)})
    text = "the group 'head' gets no leaf: earlier groups take all that it matches."
    assert text in error_of(tx.init, PARAMS, error=jg.SelectionError)
    assert "put it before '**'" in error_of(tx.init, PARAMS, error=jg.SelectionError)


@pytest.mark.parametrize(
    "wrt", [lambda path, leaf: leaf.ndim == 2, {"head": False, "trunk": False}]
)
def test_a_group_that_takes_nothing(wrt):
    tx = jg.param_groups([(wrt, optax.sgd(1.0)), ("head", optax.sgd(1.0))])
    for call in (tx.init, tx.assign):
        text = error_of(call, PARAMS, error=jg.SelectionError)
        assert "matches no leaf, so its transformation would train nothing" in text
        assert text.endswith("The tree's paths: 'head', 'trunk'.")


def test_no_groups():
    assert "at least one group" in error_of(jg.param_groups, {}, error=jg.SelectionError)


def test_a_state_for_other_leaves():
    tx = jg.param_groups({"**": optax.adam(1.0)})
    text = error_of(tx.update, GRADS, tx.init(PARAMS), PARAMS)
    assert text == (
        "the state was made for other leaves than those that have gradients: missing none, "
        "unexpected '0/mu/trunk', '0/nu/trunk'. Make it with tx.init(trainable), from "
        "`trainable, frozen = jaxgrad.partition(params, wrt)`."
    )


def test_momentum_is_not_dropped_in_silence():
    tx = jg.param_groups({"**": optax.sgd(1.0, momentum=0.9)})
    text = error_of(tx.update, GRADS, tx.init(PARAMS), GRADS)
    assert ", unexpected '0/trace/trunk'." in text


def test_errors_of_a_transformation_are_its_own():
    def update(updates, state, params=None):
        raise ValueError("mine")

    tx = jg.param_groups({"head": optax.GradientTransformation(lambda p: (), update)})
    assert error_of(tx.update, GRADS, tx.init(PARAMS), PARAMS, error=ValueError) == "mine"


def test_gradients_without_parameters():
    tx = jg.param_groups({"**": optax.sgd(1.0)})
    text = error_of(
        tx.update,
        jax.tree.map(jnp.ones_like, PARAMS),
        tx.init(GRADS),
        {"head": jnp.ones(2), "trunk": None},
    )
    assert text.startswith("there are gradients for 'trunk' but no parameters. Pass as params=")


def test_updates_of_another_structure():
    tx = jg.param_groups({"head": optax.sgd(1.0)})
    text = "params has 1 leaf that updates lacks: 'trunk'."
    assert text in error_of(tx.update, {"head": jnp.ones(2)}, tx.init(PARAMS), PARAMS)
    assert text in error_of(jg.apply_updates, PARAMS, {"head": jnp.ones(2)})


def test_apply_updates_errors():
    assert error_of(jg.apply_updates, {"a": None}, {"a": jnp.ones(2)}).startswith(
        "there is an update for 'a' but no parameter."
    )
    assert error_of(jg.apply_updates, {"a": jnp.ones(2)}, {"a": jnp.ones(3)}) == (
        "the update for 'a' is float32[3], but the parameter is float32[2]."
    )


def test_integers_with_gradients_of_no_dtype_stay():
    params = {"a": jnp.ones(2), "count": jnp.array(3)}
    grads = jax.grad(lambda p: p["a"].sum(), allow_int=True)(params)
    tx = jg.param_groups({"a": optax.sgd(1.0)})
    updates, _ = tx.update(grads, tx.init(params), params)
    new = jg.apply_updates(params, updates)
    assert new["count"] is params["count"] and (new["a"] == 0).all()


def test_apply_updates_keeps_dtypes_and_whole_leaves():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "c": 3.0}
    new = jg.apply_updates(params, {"a": jnp.full(2, 0.5), "b": None, "c": None})
    assert new["a"].dtype == jnp.bfloat16 and (new["a"] == 1.5).all()
    assert new["b"] is params["b"] and new["c"] == 3.0
    half = {"a": params["a"], "b": None, "c": None}
    assert jg.apply_updates(half, {"a": jnp.ones(2), "b": None, "c": None})["b"] is None


# What a head-only step costs, in every recipe that is known to cost more than it should.

LAYERS = {f"layer{i}": 0.1 * jnp.ones((64, 64)) for i in range(4)}
SPLIT_RECIPES = {
    "plain": lambda tx: tx,
    "clip in the chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


def deep_loss(params, x):
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return (x**2).mean()


def flops(step, *args):
    return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("recipe", SPLIT_RECIPES)
def test_a_head_only_step_costs_what_one_split_by_hand_costs(recipe):
    make, sgd, x = SPLIT_RECIPES[recipe], optax.sgd(1e-2, momentum=0.9), jnp.ones((32, 64))

    def ours(params, state, x):
        value, grads = jg.value_and_grad(deep_loss, wrt="layer3")(params, x)
        trainable, _ = jg.partition(params, "layer3")
        updates, state = tx.update(grads, state, trainable)
        return jg.apply_updates(params, updates), state, value

    def by_hand(head, frozen, state, x):
        value, grad = jax.value_and_grad(lambda h: deep_loss(frozen | {"layer3": h}, x))(head)
        updates, state = plain.update(grad, state, head)
        return optax.apply_updates(head, updates), state, value

    tx, plain = make(jg.param_groups({"layer3": sgd})), make(sgd)
    state = tx.init(jg.partition(LAYERS, "layer3")[0])
    head, frozen = LAYERS["layer3"], {k: v for k, v in LAYERS.items() if k != "layer3"}
    expected = flops(by_hand, head, frozen, plain.init(head), x)
    np.testing.assert_allclose(flops(ours, LAYERS, state, x), expected, rtol=0.05)


def test_gradients_from_a_jit_of_their_own_cost_what_they_cost_by_hand():
    x = jnp.ones((32, 64))
    by_hand = lambda head, frozen, x: jax.value_and_grad(
        lambda h: deep_loss(frozen | {"layer3": h}, x)
    )(head)
    frozen = {k: v for k, v in LAYERS.items() if k != "layer3"}
    expected = flops(by_hand, LAYERS["layer3"], frozen, x)
    ours = flops(jg.value_and_grad(deep_loss, wrt="layer3"), LAYERS, x)
    np.testing.assert_allclose(ours, expected, rtol=0.05)
    assert flops(jax.value_and_grad(deep_loss), LAYERS, x) > 2 * expected
