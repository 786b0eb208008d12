from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_type

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad._jaxpr.views import Scan, view

GOLDEN = dict(np.load(Path(__file__).parents[1] / "goldens" / "autograd.npz"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def golden(prefix):
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


def message(fun, *args, error: type[Exception] = jg.GradientError, **kwargs):
    with pytest.raises(error) as info:
        fun(*args, **kwargs)
    return str(info.value)


def q(t):
    return 3 * t["a"] ** 3 - t["b"] ** 2


# The tutorial's numbers.


def test_vector_jacobian_product(x64):
    t = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([6.0, 4.0])}
    value, grads = jg.backward(q, t, gradient=jnp.ones(2))
    g = golden("q/")
    np.testing.assert_array_equal(value, g["value"])
    np.testing.assert_array_equal(value, [-12, 65])
    np.testing.assert_array_equal(grads["a"], g["a"])
    np.testing.assert_array_equal(grads["a"], [36, 81])
    np.testing.assert_array_equal(grads["b"], g["b"])
    np.testing.assert_array_equal(grads["b"], [-12, -8])


def test_gradients_are_returned_and_never_stored():
    t = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([6.0, 4.0])}
    before = dict(t)
    first = jg.backward(q, t, gradient=jnp.ones(2))[1]
    second = jg.backward(q, t, gradient=jnp.ones(2))[1]  # PyTorch would have accumulated
    assert t == before
    np.testing.assert_array_equal(first["a"], second["a"])
    assert jg.backward(q, t, gradient=jnp.ones(2), wrt="a")[1]["b"] is None


def test_layer_and_manual_update(x64):
    g = golden("layer/")

    def loss(params, x):
        y = x @ params["W"] + params["b"].reshape(1, 1)
        return (1 - y) / 2

    params = {"W": jnp.array(g["w"]), "b": jnp.array(g["b"])}
    value, grads = jg.backward(loss, params, g["x"])
    np.testing.assert_allclose(value, g["loss"], rtol=1e-14)
    np.testing.assert_array_equal(grads["W"], g["dw"])
    np.testing.assert_array_equal(grads["W"], -g["x"].T / 2)
    np.testing.assert_array_equal(grads["b"], g["db"])
    np.testing.assert_array_equal(grads["b"], [-0.5])
    np.testing.assert_array_equal(params["W"] - 0.1 * grads["W"], g["stepped"])


def test_ten_steps_of_sgd_with_momentum(x64):
    g = golden("sgd/")
    params = {
        str(i): {
            "kernel": jnp.array(g[f"start/{i}.weight"].T, jnp.float64),
            "bias": jnp.array(g[f"start/{i}.bias"], jnp.float64),
        }
        for i in (0, 2)
    }
    data, labels = jnp.array(g["pixels"] / 256), jnp.array(g["labels"])

    def apply(params, x):
        for i in (0, 2):
            x = x @ params[str(i)]["kernel"] + params[str(i)]["bias"][None]
            x = jax.nn.relu(x) if i == 0 else x
        return x

    def loss(params, data, labels):
        return (apply(params, data) - labels).sum()

    tx = optax.sgd(1e-2, momentum=0.9)
    state = tx.init(params)
    losses = []
    for _ in range(10):
        value, grads = jg.value_and_grad(loss)(params, data, labels)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    np.testing.assert_allclose(np.array(losses), g["losses"], rtol=1e-6)
    for i in (0, 2):
        np.testing.assert_allclose(params[str(i)]["kernel"].T, g[f"end/{i}.weight"], rtol=1e-6)
        np.testing.assert_allclose(params[str(i)]["bias"], g[f"end/{i}.bias"], rtol=1e-6)
    np.testing.assert_array_equal(apply(params, data).argmax(1), g["argmax"])


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(5))
def test_backward_is_pytorchs(x64, seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape) for name, shape in (("a", (3, 4)), ("b", (4, 2)))}
    gradient = rng.normal(size=(3, 2))
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    out = torch.tanh(tensors["a"] @ tensors["b"]) * tensors["a"].exp().sum(1, keepdim=True)
    out.backward(gradient=torch.tensor(gradient))

    def fun(t):
        return jnp.tanh(t["a"] @ t["b"]) * jnp.exp(t["a"]).sum(1, keepdims=True)

    params = jax.tree.map(jnp.asarray, arrays)
    value, grads = jg.backward(fun, params, gradient=gradient)
    np.testing.assert_allclose(value, out.detach(), rtol=1e-12)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(grads[name], tensor.grad, rtol=1e-11)
        alone = jg.backward(fun, params, gradient=gradient, wrt=name)[1]
        np.testing.assert_allclose(alone[name], tensor.grad, rtol=1e-11)


# One loss over every kind of model.


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.Linear(5, 4, param_dtype=jnp.float64, rngs=rngs)
        self.head = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.trunk(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, param_dtype=jnp.float64, name="trunk")(x))
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(x)


class EquinoxNet(eqx.Module):
    trunk: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(lambda x: self.head(jnp.tanh(self.trunk(x))))(x)


def model(kind, net):
    """The parameters, their loss, and the path of a layer's weight (in the layer's layout)."""
    kernels = {
        name: {"kernel": jnp.array(net[f"{name}/weight"].T), "bias": jnp.array(net[f"{name}/bias"])}
        for name in ("trunk", "head")
    }
    if kind == "dict":

        def apply(p, x):
            x = jnp.tanh(x @ p["trunk"]["kernel"] + p["trunk"]["bias"][None])
            return x @ p["head"]["kernel"] + p["head"]["bias"][None]

        return kernels, apply
    if kind == "linen":
        return {"params": kernels}, LinenNet().apply
    if kind in ("nnx module", "nnx functional"):
        module = NnxNet(nnx.Rngs(0))
        nnx.update(module, kernels)
        if kind == "nnx module":
            return module, lambda m, x: m(x)
        return jg.functional(module)[::-1]
    key = jax.random.key(0)
    module = EquinoxNet(eqx.nn.Linear(5, 4, key=key), eqx.nn.Linear(4, 3, key=key))
    where = lambda m: (m.trunk.weight, m.trunk.bias, m.head.weight, m.head.bias)
    values = [net[f"{layer}/{leaf}"] for layer in ("trunk", "head") for leaf in ("weight", "bias")]
    return eqx.tree_at(where, module, [jnp.array(v) for v in values]), lambda m, x: m(x)


@pytest.mark.parametrize("wrt", ["**", "**/head/**", "**/bias"])
@pytest.mark.parametrize("kind", ["dict", "linen", "nnx module", "nnx functional", "equinox"])
def test_every_kind_of_model_has_pytorchs_gradients(x64, kind, wrt):
    net = golden("net/")
    params, apply = model(kind, net)
    loss = lambda p, x, y: cross_entropy(apply(p, x), y)
    value, grads = jax.jit(jg.value_and_grad(loss, wrt=wrt))(params, net["x"], net["labels"])
    np.testing.assert_allclose(value, net["loss"], rtol=1e-14)
    selected, _ = jg.partition(params, wrt)
    assert jg.paths(grads) == jg.paths(selected)
    for path, grad in zip(jg.paths(grads), jax.tree.leaves(grads), strict=True):
        *_, layer, leaf = path.split("/")
        torch_grad = net[f"{layer}/dbias" if leaf == "bias" else f"{layer}/dweight"]
        expected = torch_grad.T if leaf == "kernel" else torch_grad
        np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-15)


# What a frozen leaf costs.


def test_frozen_leaves_cost_nothing_even_where_a_norm_reads_the_gradients():
    params = {f"layer{i}": jnp.ones((32, 32)) for i in range(4)}

    def loss(params, x):
        for name in sorted(params):
            x = x @ params[name]
        return x.sum()

    def norm(grad):
        return lambda p, x: optax.tree.norm(grad(p, x))

    def by_hand(params, x):
        frozen = {k: v for k, v in params.items() if k != "layer3"}
        return jax.grad(lambda last, x: loss(frozen | {"layer3": last}, x))(params["layer3"], x)

    def flops(fun):
        return jax.jit(fun).lower(params, jnp.ones((8, 32))).compile().cost_analysis()["flops"]

    assert flops(norm(jg.grad(loss, wrt="layer3"))) == flops(norm(by_hand))
    assert flops(norm(jg.grad(loss))) > 1.5 * flops(norm(by_hand))


# Transformations.


def test_aux_jit_vmap_and_scan():
    def loss(p, x):
        return jnp.sum(p["a"] * x**2) + p["b"] * jnp.sum(x), {"x": x}

    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    xs = jnp.arange(6.0).reshape(3, 2)
    f = jg.value_and_grad(loss, wrt="a", has_aux=True)
    (value, aux), grads = jax.jit(f)(params, xs[1])
    np.testing.assert_allclose(value, 1 * 4 + 2 * 9 + 3 * 5)
    np.testing.assert_array_equal(aux["x"], xs[1])
    assert grads["b"] is None
    _, batched = jax.vmap(f, in_axes=(None, 0))(params, xs)
    np.testing.assert_allclose(batched["a"], xs**2)
    assert batched["b"] is None
    _, scanned = jax.lax.scan(lambda c, x: (c, f(params, x)[1]["a"]), 0, xs)
    np.testing.assert_allclose(scanned, xs**2)
    only, aux = jg.grad(loss, wrt="a", has_aux=True)(params, xs[1])
    np.testing.assert_array_equal(only["a"], grads["a"])
    np.testing.assert_array_equal(aux["x"], xs[1])


def test_hessians_both_ways():
    f = lambda p: (p["a"] ** 3).sum() * p["b"]
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(5.0)}
    hessian = jax.jacfwd(jg.grad(f, wrt="a"))(params)
    np.testing.assert_allclose(hessian["a"]["a"], np.diag([30.0, 60.0]))
    np.testing.assert_allclose(hessian["a"]["b"], [3.0, 12.0])
    assert hessian["b"] is None
    twice = jg.grad(lambda p: (jg.grad(f, wrt="a")(p)["a"] ** 2).sum(), wrt="b")(params)
    np.testing.assert_allclose(twice["b"], 2 * 5 * (9 + 144))


def test_no_tracer_leaks():
    with jax.checking_leaks():
        params = {"a": jnp.ones(3), "b": jnp.ones(3)}
        loss = lambda p, x: (x @ (p["a"] * p["b"])).mean()
        jax.jit(jg.value_and_grad(loss, wrt="a", microbatches=3))(params, jnp.ones((3, 3)))
        jg.backward(lambda p: p["a"] * p["b"], params, gradient=jnp.ones(3), wrt="b")


# Microbatches.


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_microbatches_give_the_mean_over_the_batch(x64, parts):
    net = golden("net/")
    params, apply = model("dict", net)
    batch = {"x": net["x"], "y": net["labels"]}

    def loss(p, batch, *, scale):
        logits = apply(p, batch["x"])
        return scale * cross_entropy(logits, batch["y"]), logits

    whole = jg.value_and_grad(loss, wrt="head/**", has_aux=True)
    split = jg.value_and_grad(loss, wrt="head/**", has_aux=True, microbatches=parts)
    (value, logits), grads = whole(params, batch, scale=3.0)
    (value_k, logits_k), grads_k = jax.jit(split)(params, batch, scale=3.0)
    np.testing.assert_allclose(value_k, value, rtol=1e-13)
    assert logits_k.shape == (parts, 8 // parts, 3)
    np.testing.assert_allclose(logits_k.reshape(8, 3), logits, rtol=1e-13)
    assert grads_k["trunk"] == {"kernel": None, "bias": None}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), grads_k, grads)


def test_each_microbatch_draws_from_its_own_key():
    def loss(p, x, key):
        noise = jax.random.normal(key, x.shape)
        return (p * noise).mean(), noise

    f = jg.value_and_grad(loss, has_aux=True, microbatches=2)
    for call in (
        lambda k: f(jnp.ones(()), jnp.ones(4), k),
        lambda k: f(jnp.ones(()), jnp.ones(4), key=k),
    ):
        (_, noise), _ = call(jax.random.key(0))
        assert noise.shape == (2, 2)
        assert not (noise[0] == noise[1]).any()


def test_microbatches_pass_over_nones_and_sum_half_precision_in_full():
    p = {"w": jnp.ones((), jnp.bfloat16), "b": None}
    x = jnp.full(512, 1.0, jnp.bfloat16)
    loss = lambda p, x, y: (p["w"] * x).mean()
    grads = jg.grad(loss, microbatches=512)(p, x, None)
    assert grads["w"].dtype == jnp.bfloat16
    assert grads["w"] == 1.0  # a bfloat16 sum would have stopped at 256
    assert grads["b"] is None


def test_microbatches_hold_gradients_of_the_selected_leaves_only():
    params = {"big": jnp.ones((64, 64)), "small": jnp.ones(64)}
    loss = lambda p, x: ((x @ p["big"]) * p["small"][None]).mean()
    f = jg.value_and_grad(loss, wrt="small", microbatches=4)
    eqns = jax.make_jaxpr(f)(params, jnp.ones((8, 64))).eqns
    ((eqn, scan),) = [(e, v) for e in eqns if isinstance(v := view(e), Scan)]
    _, carries, _ = scan.parts(eqn.invars)
    assert [v.aval.shape for v in carries] == [(64,)]


@pytest.mark.parametrize(
    ("args", "parts", "text"),
    [
        ((jnp.ones(5),), 2, "microbatches=2 does not divide the 5 rows of argument '0'."),
        (
            (),
            2,
            "microbatches=2, but no positional argument can be split. Pass the batch by",
        ),
    ],
)
def test_batches_that_do_not_split(args, parts, text):
    f = jg.grad(lambda p, *args: p.sum(), microbatches=parts)
    assert text in message(f, jnp.ones(2), *args)


def test_parts_of_arrays_that_differ_in_rows():
    f = jg.grad(lambda p, batch: p.sum(), microbatches=2)
    batch = {"x": jnp.ones(4), "y": jnp.ones(3)}
    assert message(f, jnp.ones(2), batch, error=jg.RowsError) == (
        "microbatches: the arrays in positional arguments must have the same number of rows "
        "(axis 0): '0/x' has 4 and '0/y' has 3. Pass what every part needs whole by keyword."
    )


def test_a_batch_by_keyword_is_not_repeated_in_silence():
    f = jg.grad(lambda p, batch, key=None: p * batch["x"].sum(), microbatches=2)
    for key in ({}, {"key": jax.random.key(0)}):
        text = message(f, jnp.ones(()), batch={"x": jnp.ones(4), "scale": 2.0}, **key)
        assert "can be split: 'batch/x' would go to each part whole. Pass the batch by" in text


def test_microbatches_of_draws_alone():
    f = jg.grad(lambda p, key, scale: p * scale * jax.random.normal(key), microbatches=2)
    key = jax.random.key(0)
    expected = jax.vmap(jax.random.normal)(jax.random.split(key)).mean()
    assert f(jnp.ones(()), key, scale=1.0) == expected


def test_microbatches_are_one_or_more():
    assert "microbatches=0; it must be 1 or more" in message(jg.grad, q, microbatches=0)


# What can't be differentiated.


@pytest.mark.parametrize(
    ("params", "wrt", "text"),
    [
        (
            {"w": jnp.ones(2), "step": jnp.zeros((), jnp.int32)},
            "**",
            "wrt selects 'step', which is int32[] and has no gradient: only floating-point leaves "
            "do. Exclude it: wrt=[..., '!step'].",
        ),
        ({"w": jnp.ones(2), "on": True}, "on", "wrt selects 'on', which is bool[]"),
        (
            {"w": jnp.ones(2), "key": jax.random.key(0)},
            "**",
            "wrt selects 'key', which is key<fry>[]",
        ),
    ],
)
def test_a_leaf_without_gradient_is_refused(params, wrt, text):
    loss = lambda p: p["w"].sum()
    assert text in message(jg.grad(loss, wrt), params, error=jg.SelectionError)
    assert text in message(jg.backward, loss, params, wrt=wrt, error=jg.SelectionError)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (lambda p: p, "the loss returns float32[2]; a gradient needs a real scalar. Reduce it"),
        (lambda p: (p.sum(), 1), "the loss returns tuple, not a scalar. If it returns (value,"),
        (lambda p: p.sum().astype(int), "the loss returns int32[]; a gradient needs a real"),
    ],
)
def test_a_loss_that_is_no_scalar(out, text):
    assert text in message(jg.grad(out), jnp.ones(2))


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def test_statistics_are_no_parameters():
    module = Noisy(nnx.Rngs(0))
    loss = lambda m, x: m.norm(x).sum()
    text = message(
        jg.grad(loss, ["**", "!drop/**"]), module, jnp.ones((3, 2)), error=jg.SelectionError
    )
    assert text.startswith("wrt selects 'norm/mean', a running statistic (BatchStat)")
    assert "'!norm/mean'" in text and "jaxgrad.functional(model)" in text


@pytest.mark.parametrize(
    ("call", "changed"),
    [
        (lambda m, x: m.norm(x), "'norm/mean', 'norm/var'"),
        (lambda m, x: m.drop(x * m.norm.scale[None]), "'drop/rngs/count'"),
    ],
)
def test_changes_to_a_module_are_not_lost_in_silence(call, changed):
    loss = lambda m, x: call(m, x).sum()
    text = message(jg.grad(loss, "norm/scale"), Noisy(nnx.Rngs(0)), jnp.ones((3, 2)))
    assert text.startswith(
        f"the loss changes {changed} of the NNX module it is passed. The change is lost"
    )


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit])
def test_a_module_that_writes_back_what_it_was_passed_changes_nothing(wrap):
    module = Noisy(nnx.Rngs(0))
    module.eval()
    inner = lambda m, x: m.drop(m.norm(x))
    f = lambda inner: jg.grad(lambda m, x: (inner(m, x) ** 2).sum(), "norm/scale")
    x = jnp.arange(6.0).reshape(3, 2)
    grads, expected = (f(i)(module, x).norm.scale[...] for i in (wrap(inner), inner))
    np.testing.assert_allclose(grads, expected, rtol=1e-6)
    module.norm.train()
    text = message(f(wrap(inner)), module, x)
    assert text.startswith("the loss changes 'norm/mean', 'norm/var' of the NNX module")


# Cotangents.


def test_scalars_need_no_cotangent():
    for shape in ((), (1,), (1, 1)):
        value, grad = jg.backward(lambda p: p**2, jnp.full(shape, 3.0))
        assert value.shape == grad.shape == shape
        np.testing.assert_array_equal(grad, np.full(shape, 6.0))


def test_a_python_number_is_a_cotangent_for_a_scalar():
    _, grad = jg.backward(lambda p: p**2, jnp.array(3.0), gradient=2)
    assert grad == 12 and grad.dtype == jnp.float32


def test_numpy_cotangents_have_the_dtype_jax_would_give_them():
    _, grad = jg.backward(lambda p: p**2, jnp.ones(2), gradient=np.ones(2))
    np.testing.assert_array_equal(grad, [2.0, 2.0])


def test_pytrees_of_values():
    def f(p, scale):
        return {"y": p * scale, "loss": p.sum(), "index": jnp.argmax(p), "none": None}

    p = jnp.array([1.0, 2.0])
    cotangent = {"y": jnp.array([1.0, 10.0]), "loss": None, "index": None, "none": None}
    value, grad = jg.backward(f, p, 3.0, gradient=cotangent)
    assert value["index"] == 1 and value["none"] is None
    np.testing.assert_array_equal(grad, [4.0, 31.0])


@pytest.mark.parametrize(
    ("out", "gradient", "text"),
    [
        (
            lambda p: p,
            None,
            "the value is float32[2], not a real scalar, so backward needs gradient=, a cotangent",
        ),
        (
            lambda p: {"a": p.sum(), "b": p},
            None,
            "the value 'b' is float32[2], not a real scalar, so backward needs gradient=",
        ),
        (
            lambda p: p,
            jnp.ones(3),
            "gradient is float32[3], but the value is float32[2]; a cotangent has the shape and",
        ),
        (
            lambda p: p,
            jnp.ones(2, jnp.bfloat16),
            "gradient is bfloat16[2], but the value is float32[2]; a cotangent has the shape and "
            "dtype of the value. Use jnp.broadcast_to or .astype('float32').",
        ),
        (lambda p: p, 1.0, "gradient is float32[], but the value is float32[2]"),
        (
            lambda p: p.sum().astype(complex),
            None,
            "the value is complex64[], not a real scalar, so backward",
        ),
        (lambda p: p.astype(int), None, "fun returns int32[2]: only floating-point values"),
        (lambda p: None, None, "fun returns no array: only floating-point values"),
        (
            lambda p: {"a": p.astype(int), "b": p},
            {"a": jnp.ones(2), "b": jnp.ones(2)},
            "the value 'a' is int32[2], which has no gradient; pass None",
        ),
        (
            lambda p: {"a": p},
            jnp.ones(2),
            "the value of fun has 1 leaf that gradient lacks: 'a'.",
        ),
    ],
)
def test_wrong_cotangents(out, gradient, text):
    assert text in message(jg.backward, out, jnp.ones(2), gradient=gradient)


# stop_gradient.


def test_stop_gradient_cuts_the_leaves_selected():
    params = {"online": jnp.array(2.0), "target": jnp.array(3.0), "steps": 4}

    def loss(p):
        p = jg.stop_gradient(p, ["target", "steps"])
        return p["online"] * p["target"] * p["steps"]

    grads = jax.grad(loss, allow_int=True)(params | {"steps": jnp.array(4.0)})
    assert (grads["online"], grads["target"], grads["steps"]) == (12.0, 0.0, 0.0)
    assert jg.stop_gradient(params, "target") == params
    assert "Did you mean 'target'?" in message(
        jg.stop_gradient, params, "targt", error=jg.SelectionError
    )


class Line(NamedTuple):
    slope: jax.Array
    offset: jax.Array


def test_gradients_have_the_type_of_the_parameters():
    def loss(line: Line, x: jax.Array) -> jax.Array:
        return jnp.sum(jg.tap(line.slope * x + line.offset, "y"))

    def with_aux(line: Line, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return loss(line, x), {"x": x}

    line, x = Line(jnp.array(2.0), jnp.array(1.0)), jnp.ones(3)
    # pyright checks the types; here they are what they say.
    value, grads = assert_type(jg.value_and_grad(loss, "slope")(line, x), tuple[jax.Array, Line])
    assert value == 9 and grads.slope == 3 and grads.offset is None
    assert assert_type(jg.grad(loss)(line, x), Line) == Line(jnp.array(3.0), jnp.array(3.0))
    grads, aux = assert_type(
        jg.grad(with_aux, has_aux=True)(line, x), tuple[Line, dict[str, jax.Array]]
    )
    assert grads.offset == 3 and aux["x"].shape == (3,)
    grads, taps = assert_type(jg.grad(loss, taps=True)(line, x), tuple[Line, Mapping[str, Any]])
    assert grads.slope == 3 and taps["y"].tolist() == [1, 1, 1]
    both = jg.value_and_grad(with_aux, has_aux=True, taps=True)(line, x)
    (_, aux), (grads, _) = assert_type(
        both, tuple[tuple[jax.Array, dict[str, jax.Array]], tuple[Line, Mapping[str, Any]]]
    )
    assert aux["x"].shape == (3,) and grads.slope == 3
    value, grads = assert_type(jg.backward(loss, line, x), tuple[jax.Array, Line])
    assert value == 9 and grads.slope == 3
    each = assert_type(jg.per_example_grads(loss)(line, x), Line)
    assert each.slope.tolist() == [1, 1, 1]
