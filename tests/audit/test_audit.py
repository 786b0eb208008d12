"""Every known trap is flagged, and what is right passes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrad as jg


@pytest.fixture(autouse=True)
def optax_promotes():
    """Adam's bias correction and others of Optax's own steps don't hold under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {f"layer{i}": 0.3 * jax.random.normal(k, (16, 16)) for i, k in enumerate(keys)}
    return params | {"bias": jnp.zeros(16)}


def loss(params, batch):
    h = batch["x"]
    for name in ("layer0", "layer1"):
        h = jnp.tanh(h @ params[name])
    return ((h @ params["layer2"] + params["bias"][None] - batch["y"]) ** 2).mean()


PARAMS = make_params()
WRT = ["layer2", "bias"]
FROZEN = {"layer0", "layer1"}
BATCH = {"x": jax.random.normal(jax.random.key(1), (32, 16)), "y": jnp.ones((32, 16))}
IS_FROZEN = {name: name in FROZEN for name in PARAMS}
IS_TRAINED = {name: name not in FROZEN for name in PARAMS}
LABELS = {name: "frozen" if name in FROZEN else "trained" for name in PARAMS}

SGD = optax.sgd(1e-2, momentum=0.9)
HIDE = optax.masked(optax.set_to_zero(), IS_FROZEN)


def partitioned(tx):
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, LABELS)


def groups(tx=SGD):
    return jg.param_groups([(WRT, tx)])


def audited(tx, loss=loss, params=PARAMS, batch=BATCH, wrt=WRT, **options):
    return jg.audit(loss, params, batch, tx, wrt, **options)


def kinds(audit):
    return {leak.kind for leak in audit.leaks}


def leak(audit, kind):
    (found,) = [leak for leak in audit.leaks if leak.kind == kind]
    return found


# What is right passes.

CLEAN = {
    "alone": groups(),
    "lamb": groups(optax.lamb(1e-2, weight_decay=0.1)),
    "clip before": optax.chain(optax.clip_by_global_norm(1e-3), groups()),
    "decay after": optax.chain(groups(), optax.add_decayed_weights(-1e-2)),
    "MultiSteps": optax.MultiSteps(groups(), 2),
    "apply_if_finite": optax.apply_if_finite(groups(), 3),
    "schedule that starts at zero": groups(optax.sgd(optax.linear_schedule(0.0, 0.1, 10))),
}


@pytest.mark.parametrize("name", CLEAN)
def test_param_groups_are_clean(name):
    audit = audited(CLEAN[name])
    assert audit.leaks == ()
    audit.raise_if_leaky()
    assert {row.path for row in audit.rows if row.change} == {"layer2", "bias"}
    for path in FROZEN:
        row = audit[path]
        assert (row.gradient, row.state, row.change, row.why) == ("none", 0, None, ())
        assert row.used and not row.share
    np.testing.assert_allclose(audit.cost.flops, audit.split.flops)
    np.testing.assert_allclose(sum(row.share for row in audit.rows), 1)


def test_partition_in_one_jit_is_clean():
    """Nothing reads the frozen gradients, so XLA drops them."""
    audit = audited(partitioned(SGD))
    assert audit.leaks == ()
    assert audit["layer0"].gradient == "dropped"
    assert audit.cost.flops < 1.1 * audit.split.flops


def test_the_trained_half_alone_is_clean():
    audit = audited(optax.adamw(1e-2, weight_decay=0.1), grad=jg.grad(loss, WRT))
    assert audit.leaks == ()
    assert audit["layer2"].why == ("gradient", "decay", "momentum")
    assert audit["layer2"].state == 2 * 4 * 16 * 16


def test_full_training_is_clean():
    audit = audited(optax.adamw(1e-2), wrt=None)
    assert audit.leaks == () and all(row.trained and row.change for row in audit.rows)


# The traps of Optax.


def test_masked_passes_the_raw_gradient_through():
    audit = audited(optax.masked(optax.sgd(0.1), IS_TRAINED))
    found = leak(audit, "moves")
    assert set(found.paths) == FROZEN and "moves up the loss" in found.why
    assert audit["layer0"].why == ("raw gradient",)
    grads = jax.grad(loss)(PARAMS, BATCH)
    assert audit["layer0"].change.largest > float(jnp.abs(grads["layer0"]).max())
    # behind a clip it is no more the gradient itself
    tx = optax.chain(optax.masked(optax.adam(0.1), IS_TRAINED), optax.clip(1e-3))
    assert audited(tx)["layer0"].why == ("raw gradient",)


def test_a_mask_that_forgets_a_trained_leaf():
    audit = audited(optax.chain(optax.masked(SGD, IS_TRAINED | {"bias": False}), HIDE))
    assert leak(audit, "ascends").paths == ("bias",)


def test_decay_moves_what_is_frozen_before_it():
    audit = audited(optax.chain(HIDE, optax.adamw(1e-2, weight_decay=0.1)))
    assert kinds(audit) == {"moves", "state"}
    assert set(leak(audit, "moves").paths) == FROZEN
    assert leak(audit, "moves").why.startswith("weight decay")
    assert audit["layer0"].why == ("decay",)
    assert audit["layer0"].state == 2 * 4 * 16 * 16
    assert leak(audit, "state").what == "frozen, but the optimizer holds 4.1 kB of state for it"


def test_decay_of_a_weight_that_is_zero():
    params = PARAMS | {"layer0": jnp.zeros((16, 16))}
    audit = audited(optax.chain(HIDE, optax.adamw(1e-2)), params=params)
    assert audit["layer0"].why == ("decay",) and audit["layer0"].change is None
    assert "layer0" in leak(audit, "moves").paths


def test_adamw_and_stop_gradient():
    def stopped(params, batch):
        return loss(jg.stop_gradient(params, "layer[01]"), batch)

    audit = audited(optax.adamw(1e-2, weight_decay=0.1), stopped)
    assert kinds(audit) == {"moves", "state"}
    row = audit["layer1"]
    assert row.why == ("decay",) and row.gradient == "zero" and row.used
    shrunk = float(jnp.abs(PARAMS["layer1"]).max()) * (1 - (1 - 1e-3) ** 4)
    np.testing.assert_allclose(row.change.largest, shrunk, rtol=1e-3)


def test_frozen_gradients_inflate_the_global_norm():
    audit = audited(optax.chain(optax.clip_by_global_norm(1e-3), partitioned(SGD)))
    assert {"norm", "gradient"} <= kinds(audit)
    found = leak(audit, "norm")
    assert set(found.paths) == FROZEN
    grads = jax.grad(loss)(PARAMS, BATCH)
    squares = {name: float((g**2).sum()) for name, g in grads.items()}
    share = sum(squares[name] for name in FROZEN) / sum(squares.values())
    assert f"makes up {share:.1%} of the squared gradient norm" in found.what
    np.testing.assert_allclose(
        audit["layer1"].share, squares["layer1"] / sum(squares.values()), rtol=1e-6
    )


def test_clip_that_is_not_reached_yet():
    audit = audited(optax.chain(optax.clip_by_global_norm(3.0), partitioned(SGD)))
    assert optax.tree.norm(jax.grad(loss)(PARAMS, BATCH)) < 3
    assert "norm" in kinds(audit)


def test_a_norm_of_the_trained_gradients_alone_is_no_leak():
    assert audited(partitioned(optax.chain(optax.clip_by_global_norm(1e-3), SGD))).leaks == ()


def test_momentum_of_a_leaf_that_was_frozen_later():
    """Re-freezing without dropping the state: the gradient is zero and the weight moves on."""
    tx = optax.adam(1e-2)
    state = tx.init(PARAMS)
    _, state = tx.update(jax.grad(loss)(PARAMS, BATCH), state, PARAMS)

    def stopped(params, batch):
        return loss(jg.stop_gradient(params, "layer[01]"), batch)

    audit = audited(tx, stopped, opt_state=state)
    assert audit["layer0"].why == ("momentum",) and audit["layer0"].change
    assert "momentum" in leak(audit, "moves").why
    assert not audited(tx, stopped)["layer0"].change  # with a new state it stays


def test_noise_moves_what_has_no_gradient():
    audit = audited(optax.chain(SGD, HIDE, optax.add_noise(1e-3, 0.5, jax.random.key(0))))
    assert audit["layer0"].why == ("noise",)


def test_no_freezing_at_all():
    audit = audited(optax.sgd(1e-2))
    assert audit["layer0"].why == ("gradient",)
    assert kinds(audit) == {"moves", "gradient"}


# The recipes in which the frozen gradients are not dropped.

DEAR = {
    "chain(sgd, set_to_zero)": (optax.chain(SGD, HIDE), {"gradient", "state"}),
    "chain(clip, partition)": (
        optax.chain(optax.clip_by_global_norm(1.0), partitioned(SGD)),
        {"gradient", "norm"},
    ),
    "apply_if_finite(partition)": (optax.apply_if_finite(partitioned(SGD), 3), {"gradient"}),
    "MultiSteps(partition)": (
        optax.MultiSteps(partitioned(SGD), 2).gradient_transformation(),
        {"gradient", "state"},
    ),
}


@pytest.mark.parametrize("name", DEAR)
def test_gradients_that_something_reads(name):
    tx, expected = DEAR[name]
    audit = audited(tx)
    assert kinds(audit) == expected
    assert set(leak(audit, "gradient").paths) == FROZEN
    assert audit["layer0"].gradient == "computed" and audit["layer0"].change is None
    assert audit.cost.flops > 1.5 * audit.split.flops


def test_set_to_zero_before_a_clip_holds_state_but_computes_nothing():
    audit = audited(optax.chain(HIDE, optax.clip_by_global_norm(1.0), SGD))
    assert kinds(audit) == {"state"}
    assert audit["layer0"].gradient == "dropped"
    assert audit.cost.flops < 1.2 * audit.split.flops


def test_gradients_that_leave_their_jit():
    audit = audited(partitioned(SGD), grad=jax.jit(jax.grad(loss)))
    assert kinds(audit) == {"gradient"}
    assert audit["layer0"].gradient == "computed"
    assert audit.cost.flops > 1.5 * audit.split.flops
    assert audited(groups(), grad=jax.jit(jg.grad(loss, WRT))).leaks == ()


# A step of one's own.


def own_step(tx, after=lambda params: params):
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(tx.update)

    def step(params, state, batch):
        updates, state = update(gradient(params, batch), state, params)
        return after(optax.apply_updates(params, updates)), state, {"more": updates}

    return step


def test_own_step():
    audit = audited(partitioned(SGD), step=own_step(partitioned(SGD)))
    assert kinds(audit) == {"cost"}
    assert audit["layer0"].gradient == "unknown"
    assert leak(audit, "cost").what.startswith("a step takes ")
    jitted = audited(partitioned(SGD), step=jax.jit(own_step(partitioned(SGD)), donate_argnums=0))
    assert jitted.leaks == ()
    assert jitted.cost.flops < 0.7 * audit.cost.flops


def test_own_step_that_writes_a_frozen_leaf():
    step = own_step(partitioned(SGD), lambda p: p | {"layer0": p["layer0"] * 0.9})
    audit = audited(partitioned(SGD), step=step)
    assert audit["layer0"].why == ("statistics",)
    assert "the step itself writes it" in leak(audit, "moves").why


def test_own_step_that_puts_frozen_leaves_back():
    tx = optax.adamw(1e-2)
    step = own_step(tx, lambda p: {k: PARAMS[k] if k in FROZEN else v for k, v in p.items()})
    assert kinds(audited(tx, step=step)) == {"cost", "state"}


# What is trained and can't be.


def test_trained_and_unused():
    params = PARAMS | {"other": jnp.ones(3)}
    audit = audited(jg.param_groups([([*WRT, "other"], SGD)]), params=params, wrt=[*WRT, "other"])
    assert kinds(audit) == {"unused"} and leak(audit, "unused").paths == ("other",)
    assert not audit["other"].used and audit["other"].gradient == "zero"


def test_trained_behind_a_stopped_gradient():
    def stopped(params, batch):
        return loss(params | {"bias": jnp.round(params["bias"])}, batch) + jnp.argmax(
            params["layer2"]
        )

    def fully(params, batch):
        return loss(jg.stop_gradient(params, "bias"), batch)

    assert leak(audited(groups(), fully), "stopped").paths == ("bias",)
    assert "bias" in leak(audited(groups(), stopped), "stopped").paths


def test_trained_and_left_out_of_the_differentiation():
    audit = audited(groups(), grad=jg.grad(loss, "layer2"))
    assert leak(audit, "stopped").paths == ("bias",)


def test_trained_and_never_moved():
    audit = audited(partitioned(SGD), wrt=[*WRT, "layer1"])
    assert leak(audit, "stuck").paths == ("layer1",)
    slow = optax.MultiSteps(groups(), 10)
    assert kinds(audited(slow)) == {"stuck"}  # nothing is proven in fewer steps
    assert audited(slow, steps=10).leaks == ()


def test_an_unused_frozen_leaf_is_no_leak():
    audit = audited(groups(), params=PARAMS | {"other": jnp.ones(3)})
    assert audit.leaks == () and not audit["other"].used


def test_a_constant_gradient_is_a_gradient():
    audit = audited(optax.sgd(0.1), lambda p, b: p["a"].sum(), {"a": jnp.ones(2)}, None, wrt=None)
    assert audit.leaks == () and audit["a"].gradient == "computed"


# What is no parameter.


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(x))


def mean_square(model, x):
    return (model(x) ** 2).mean()


X = jax.random.normal(jax.random.key(2), (6, 4))


def test_statistics_of_nnx_that_are_lost():
    audit = jg.audit(mean_square, Net(), X, optax.sgd(0.1), "head/**", grad=grad_by_hand)
    assert leak(audit, "lost").paths == ("norm/mean", "norm/var")
    assert "a copy" in leak(audit, "lost").why


def grad_by_hand(model, x):
    """The gradient of the head, by hand."""
    graph, head, rest = nnx.split(model, nnx.PathContains("head"), ...)
    grads = jax.grad(lambda head: mean_square(nnx.merge(graph, head, rest, copy=True), x))(head)
    whole = jax.tree.map(lambda x: None, model)
    nnx.update(whole, grads)
    return whole


def test_statistics_of_nnx_that_are_trained():
    model = Net()
    model.eval()
    audit = jg.audit(mean_square, model, X, optax.sgd(0.1))
    assert kinds(audit) == {"statistics"}
    assert leak(audit, "statistics").paths == ("norm/mean", "norm/var")
    frozen = jg.audit(mean_square, model, X, optax.sgd(0.1), "head/**")
    assert set(leak(frozen, "moves").paths) == {
        "norm/bias",
        "norm/mean",
        "norm/scale",
        "norm/var",
    }


def test_functional_keeps_statistics_apart():
    apply, params = jg.functional(Net())
    audit = jg.audit(
        lambda p, x: (apply(p, x) ** 2).mean(),
        params,
        X,
        jg.param_groups({"head/**": SGD}),
    )
    assert audit.leaks == ()


def test_statistics_of_linen_under_decay():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))

    model = Model()
    variables = model.init(jax.random.key(0), X)
    square = lambda v, x: jnp.mean(jnp.square(jnp.asarray(model.apply(v, x))))
    audit = jg.audit(square, variables, X, optax.adamw(1e-2), "params/**")
    assert set(leak(audit, "gradient").paths) == {
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    }
    assert any("decay" in x.why for x in audit.leaks)


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1))
        self.head.kernel = self.embed.kernel

    def __call__(self, x):
        return self.head(jnp.tanh(self.embed(x)))


def test_tied_weights_come_apart():
    audit = jg.audit(mean_square, Tied(), X, optax.sgd(0.1))
    assert leak(audit, "tied").paths == ("embed/kernel", "head/kernel")
    shared = PARAMS["layer0"]
    audit = audited(optax.sgd(0.1), params=PARAMS | {"layer1": shared}, wrt=None)
    assert leak(audit, "tied").paths == ("layer0", "layer1")
    one_start = jnp.zeros((16, 16))
    params = PARAMS | {"layer0": one_start, "layer1": one_start}
    assert "tied" not in kinds(audited(optax.sgd(0.1), params=params, wrt=None))


def test_equinox_modules_with_functions_in_them():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    square = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
    tx = jg.param_groups({"layers/2/**": optax.adamw(1e-2)})
    assert jg.audit(square, model, X, tx).leaks == ()
    audit = jg.audit(
        square, model, X, optax.adamw(1e-2), "layers/2/**", grad=eqx.filter_grad(square)
    )
    assert kinds(audit) == {"moves", "gradient", "state"}


def test_auxiliary_outputs():
    audit = audited(groups(), lambda p, b: (loss(p, b), {"aux": p["layer0"]}), has_aux=True)
    assert audit.leaks == ()


# How it is told.


def test_table_totals_and_leaks():
    audit = audited(optax.chain(optax.clip_by_global_norm(1.0), HIDE, optax.adamw(1e-2)))
    text = repr(audit)
    lines = text.splitlines()
    assert lines[0].split() == ["path", "array", "gradient", "norm", "state", "moved", "why"]
    (bias,) = [line for line in lines if line.startswith("   bias")]
    assert bias.split()[:4] == ["bias", "float32[16]", "trained", "computed"]
    (layer0,) = [line for line in lines if line.startswith("!  layer0")]
    assert "frozen" in layer0 and layer0.endswith("decay")
    assert "A step: " in text and "Split by wrt: " in text and " at its peak." in text
    assert "Optimizer state: 6.28 kB, 4.1 kB of it for frozen parameters." in text
    assert "Staging: " in text and "4 leaks:" in text
    page = audit._repr_html_()
    assert page.count("<tr") == 5 and "float32[16,16]" in page and "weight decay" in page


def test_paths_are_escaped_in_html():
    params = {"<b>": jnp.ones(2)}
    page = jg.audit(lambda p, b: (p["<b>"] ** 2).sum(), params, None, SGD)._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page


def after_a_step(tx, wrt):
    trained, _ = jg.partition(PARAMS, wrt)
    return tx.update(jg.grad(loss, wrt)(PARAMS, BATCH), tx.init(trained), trained)[1]


def test_an_optimizer_that_is_rebuilt_forgets_momentum():
    wide = ["layer1", *WRT]
    tx = lambda wrt: jg.param_groups([(wrt, SGD)])
    before = after_a_step(tx(WRT), WRT)
    rebuilt = tx(wide).init(jg.partition(PARAMS, wide)[0])
    audit = audited(tx(wide), wrt=wide, opt_state=rebuilt, previous=before)
    assert set(leak(audit, "forgotten").paths) == {"layer2", "bias"}
    assert "starts from scratch" in str(leak(audit, "forgotten"))
    carried = after_a_step(tx(wide), wide)
    assert not audited(tx(wide), wrt=wide, opt_state=carried, previous=before).leaks


def test_half_of_the_parameters_is_saved(tmp_path):
    half, _ = jg.partition(PARAMS, "layer2")
    for saved in (half, tmp_path / "half"):
        if saved is not half:
            jg.save(saved, {"layer2": PARAMS["layer2"]})
        audit = audited(groups(), saved=saved)
        assert set(leak(audit, "unsaved").paths) == PARAMS.keys() - {"layer2"}
    jg.save(tmp_path / "whole", PARAMS)
    assert not audited(groups(), saved=tmp_path / "whole").leaks
    with pytest.raises(FileNotFoundError, match="nowhere"):
        audited(groups(), saved=tmp_path / "nowhere")


def test_raise_if_leaky_names_path_what_why_and_fix():
    audit = audited(optax.chain(HIDE, optax.adamw(1e-2, weight_decay=0.1)))
    with pytest.raises(jg.LeakError) as info:
        audit.raise_if_leaky()
    first, moves, state = str(info.value).splitlines()
    assert first == "2 leaks:"
    assert moves.startswith("- 'layer0', 'layer1': frozen, but moved by up to ")
    assert "in 4 steps. Why: weight decay: its update depends on its value" in moves
    assert "Fix: apply the decay to trained parameters only: jaxgrad.param_groups" in moves
    assert "Why: the optimizer was initialised on frozen parameters too. Fix:" in state


def test_totals():
    audit = audited(groups())
    assert audit.cost.peak > sum(x.nbytes for x in PARAMS.values())
    assert audit.cost.nbytes > 0
    assert audit.state == 4 * (16 * 16 + 16)
    assert audit.staging.staged and audit.staging.nbytes == 4 * 16
    assert audited(groups(), batch=BATCH | {"scale": jnp.ones(())}).staging is None


def test_nothing_is_mutated():
    params, before = dict(PARAMS), {k: np.asarray(v).copy() for k, v in PARAMS.items()}
    audited(SGD, params=params)
    jg.assert_frozen(before, params, lambda path, leaf: False)


# Errors.


def test_errors():
    with pytest.raises(jg.SelectionError, match=r"Did you mean 'layer2'"):
        audited(SGD, wrt="layer9")
    with pytest.raises(jg.AuditError, match=r"steps=0; it must be 1 or more"):
        audited(SGD, steps=0)
    text = "params has 3 leaves that the result of grad lacks: 'bias'"
    with pytest.raises(jg.AuditError, match=text):
        audited(SGD, grad=lambda p, b: {"layer0": p["layer0"]})
    with pytest.raises(KeyError, match="nowhere"):
        audited(groups())["nowhere"]
