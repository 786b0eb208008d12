"""What is shown to treat each example by itself, and what is not."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jaxgrad as jg

ROWS, TIME, WIDTH, CLASSES = 4, 6, 8, 5
KEY = jax.random.key(0)


def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), "float32")
    lengths = jnp.array([6, 2, 1, 4])
    batch = {
        "x": draw(ROWS, WIDTH),
        "y": draw(ROWS, CLASSES),
        "label": jnp.array([1, 0, 4, 2]),
        "image": draw(ROWS, 8, 8, 3),
        "tokens": jnp.asarray(rng.integers(0, 11, (ROWS, TIME))),
        "series": draw(ROWS, TIME, WIDTH),
        "lengths": lengths,
        "mask": (jnp.arange(TIME)[None] < lengths[:, None]).astype("float32"),
        "group": jnp.array([0, 1, 0, 1]),
        "weight": jnp.array([1.0, 2.0, 0.5, 3.0]),
    }
    params = {
        "w1": draw(WIDTH, WIDTH) / 3,
        "w2": draw(WIDTH, CLASSES) / 3,
        "b": draw(CLASSES),
        "table": draw(11, WIDTH),
        "kernel": draw(3, 3, 3, CLASSES) / 5,
        "stack": draw(3, WIDTH, WIDTH) / 3,
    }
    return params, batch


PARAMS, BATCH = arrays()


def logits(p, b):
    return jnp.tanh(b["x"] @ p["w1"]) @ p["w2"] + p["b"][None]


def each(p, b):
    return optax.softmax_cross_entropy_with_integer_labels(logits(p, b), b["label"])


def per_token(p, b):
    return jnp.square(b["series"] @ p["w1"]).mean(-1)


def attention(p, b, mask=None):
    x = p["table"][b["tokens"]]
    scores = jnp.einsum("btd,bsd->bts", x @ p["w1"], x) / WIDTH**0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, :] > 0, scores, -1e9)
    return jax.nn.softmax(scores, -1) @ x


def convolution(p, b):
    layout = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(
        b["image"], p["kernel"], (1, 1), "SAME", dimension_numbers=layout
    )
    out = jnp.max(jax.nn.relu(out).reshape(len(out), 4, 2, 4, 2, -1), axis=(2, 4))
    return optax.softmax_cross_entropy(out.mean((1, 2)), jax.nn.one_hot(b["label"], CLASSES)).mean()


def pooled(p, b):
    out = nn.max_pool(b["image"] @ p["kernel"][0, 0], (2, 2), (2, 2))
    return optax.softmax_cross_entropy_with_integer_labels(out.mean((1, 2)), b["label"]).mean()


def over_layers(p, b):
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w) + x, None))
    x, _ = lax.scan(block, b["x"], p["stack"])
    return jnp.mean(x**2)


def over_time(p, b):
    def step(h, x):
        h = jnp.tanh(x @ p["w1"] + h)
        return h, jnp.mean(h**2, -1)

    h = jnp.zeros((len(b["series"]), WIDTH))
    _, out = lax.scan(step, h, b["series"].swapaxes(0, 1))
    return jnp.mean(out)


def total_over_time(p, b):
    step = lambda total, x: (total + jnp.sum((x @ p["w1"]) ** 2), None)
    total, _ = lax.scan(step, 0.0, b["series"].swapaxes(0, 1))
    return total / b["series"].size


def lengthwise(p, b):
    out = b["series"] @ p["w1"]
    last = out[jnp.arange(len(out)), b["lengths"] - 1]
    return jnp.mean(last**2)


def huber_with_penalty(p, b):
    out = optax.huber_loss(logits(p, b), b["y"]).sum(-1).mean()
    return out + 1e-2 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))


def gradient_penalty(p, b):
    score = lambda x: jnp.sum(jnp.tanh(x @ p["w1"]))
    slope = jax.vmap(jax.grad(score))(b["x"])
    return jnp.mean((jnp.sqrt(jnp.sum(slope**2, -1) + 1e-6) - 1) ** 2)


def branches(p, b):
    x = lax.cond(p["b"][0] > 0, jnp.tanh, jax.nn.relu, b["x"] @ p["w1"])
    return jnp.mean(x)


@jax.custom_vjp
def straight(x):
    return jnp.round(x)


straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def on_each(p, b):
    return jax.vmap(lambda x, y: jnp.sum((jnp.tanh(x @ p["w1"]) @ p["w2"] - y) ** 2))(
        b["x"], b["y"]
    )


def quarters(p, b):
    total = 0.0
    for part in jnp.split(b["series"], 2, axis=1):
        total = total + jnp.sum((part @ p["w1"]) ** 2)
    return total / (2 * b["series"].shape[0])


def of_module(module, call=lambda m, x: m(x)):
    params, static = eqx.partition(module, eqx.is_array)
    run = lambda p, x: call(eqx.combine(p, static), x)
    return (lambda p, b: jnp.mean(jax.vmap(lambda x: run(p, x))(b["x"]) ** 2)), params


def equinox():
    return of_module(eqx.nn.MLP(WIDTH, 2, 16, 2, key=KEY))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.bn = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x, mask):
        mask = nnx.make_attention_mask(mask > 0, mask > 0)
        x = x + self.attend(self.norm(x), mask=mask)
        return self.out(self.bn(x).mean(1))


def of_nnx(train):
    apply, params = jg.functional(Block(nnx.Rngs(0)))

    def loss(p, b):
        out = (
            apply.train(p, b["series"], b["mask"])[0] if train else apply(p, b["series"], b["mask"])
        )
        return optax.softmax_cross_entropy_with_integer_labels(out, b["label"]).mean()

    return loss, params


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=1)(nn.Conv(4, (3, 3))(x)))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


def linen():
    model = Linen()
    params = model.init(KEY, BATCH["image"])
    loss = lambda p, b: jnp.mean((model.apply(p, b["image"]) - b["y"]) ** 2)
    return loss, params


ORDINARY = {
    "mlp": lambda p, b: jnp.mean((logits(p, b) - b["y"]) ** 2),
    "integer labels by optax": lambda p, b: each(p, b).mean(),
    "integer labels by index": lambda p, b: (
        -jax.nn.log_softmax(logits(p, b))[jnp.arange(len(b["label"])), b["label"]].mean()
    ),
    "integer labels by an index of numpy": lambda p, b: (
        -jax.nn.log_softmax(logits(p, b))[np.arange(len(b["label"])), b["label"]].mean()
    ),
    "integer labels by take_along_axis": lambda p, b: (
        -jnp.take_along_axis(jax.nn.log_softmax(logits(p, b)), b["label"][:, None], 1).mean()
    ),
    "one-hot labels": lambda p, b: (
        -jnp.mean(
            jnp.sum(jax.nn.one_hot(b["label"], CLASSES) * jax.nn.log_softmax(logits(p, b)), -1)
        )
    ),
    "smoothed labels": lambda p, b: optax.softmax_cross_entropy(
        logits(p, b), optax.smooth_labels(jax.nn.one_hot(b["label"], CLASSES), 0.1)
    ).mean(),
    "sum by the number of rows": lambda p, b: jnp.sum(each(p, b)) / len(b["label"]),
    "sum times its inverse": lambda p, b: jnp.sum(each(p, b) * (1 / len(b["label"]))),
    "product with ones": lambda p, b: each(p, b) @ jnp.ones(len(b["label"])) / b["label"].shape[0],
    "mean of the rows first": lambda p, b: jnp.mean(jnp.mean((logits(p, b) - b["y"]) ** 2, 0)),
    "weighted rows": lambda p, b: jnp.mean(each(p, b) * b["weight"]),
    "features in bfloat16": lambda p, b: jnp.mean(
        (b["x"].astype("bfloat16").astype("float32") @ p["w1"]) ** 2
    ),
    "huber and an L2 penalty": huber_with_penalty,
    "convolution": convolution,
    "max pooling": pooled,
    "attention": lambda p, b: jnp.mean(attention(p, b) ** 2),
    "masked attention": lambda p, b: jnp.mean(attention(p, b, b["mask"]) ** 2),
    "causal attention": lambda p, b: jnp.mean(
        jax.nn.dot_product_attention(*[b["series"][:, :, None] @ p["w1"]] * 3, is_causal=True)
    ),
    "mean of the tokens of each row": lambda p, b: jnp.mean(
        (per_token(p, b) * b["mask"]).sum(1) / jnp.maximum(b["mask"].sum(1), 1)
    ),
    "next token": lambda p, b: optax.softmax_cross_entropy_with_integer_labels(
        (attention(p, b) @ p["table"].T)[:, :-1], b["tokens"][:, 1:]
    ).mean(),
    "tokens and examples in one axis": lambda p, b: jnp.mean(
        jnp.tanh(b["series"].reshape(-1, WIDTH) @ p["w1"]) ** 2
    ),
    "the last token by length": lengthwise,
    "scan over layers": over_layers,
    "scan over time": over_time,
    "sum in a scan over time": total_over_time,
    "map over the examples": lambda p, b: jnp.mean(
        lax.map(lambda x: jnp.sum(jnp.tanh(x @ p["w1"])), b["x"])
    ),
    "vmap over the examples": lambda p, b: jnp.mean(on_each(p, b)),
    "a sum in pieces": quarters,
    "gradient penalty of each example": gradient_penalty,
    "cond on a parameter": branches,
    "a derivative of its own": lambda p, b: jnp.mean(straight(b["x"] @ p["w1"])),
    "a token set to zero": lambda p, b: jnp.mean((b["series"] @ p["w1"]).at[:, 0].set(0.0) ** 2),
    "sorted features": lambda p, b: jnp.mean(jnp.sort(b["x"] @ p["w1"], -1)[:, -2:]),
    "triplets": lambda p, b: jnp.mean(
        jax.nn.relu(1 + jnp.sum((b["x"] - logits(p, b) @ p["w2"].T) ** 2, -1) - b["x"][:, 0])
    ),
    "half of them, stopped": lambda p, b: jnp.mean(lax.stop_gradient(logits(p, b)) * logits(p, b)),
    "nothing of the batch": lambda p, b: jnp.sum(p["b"] ** 2),
    "equinox under vmap": equinox,
    "nnx, BatchNorm in inference": lambda: of_nnx(train=False),
    "linen, GroupNorm": linen,
}


def problem(entry):
    """A loss and its parameters."""
    try:
        loss, params = entry()
    except TypeError:
        return entry, PARAMS
    return loss, params


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=2e-5), a, b)


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_losses_are_the_mean_of_their_parts(name):
    loss, params = problem(ORDINARY[name])

    @jax.jit
    def grads(p, b):
        parts, each = jg.grad(loss, microbatches=2)(p, b), jg.per_example_grads(loss)(p, b)
        return jax.grad(loss)(p, b), parts, jax.tree.map(lambda g: g.mean(0), each)

    whole, of_parts, of_examples = grads(params, BATCH)
    same(of_parts, whole)
    same(of_examples, whole)


def dropout(p, b, key):
    keep = jax.random.bernoulli(key, 0.5, b["x"].shape)
    return jnp.mean(jnp.where(keep, b["x"] * 2, 0) @ p["w1"])


def dropout_over_layers(p, b, key):
    def block(carry, w):
        x, key = carry
        key, mine = jax.random.split(key)
        keep = jax.random.bernoulli(mine, 0.9, x.shape)
        return (jnp.tanh(jnp.where(keep, x, 0.0) @ w), key), None

    (x, _), _ = lax.scan(block, (b["x"], key), p["stack"])
    return jnp.mean(x**2)


def diffusion(p, b, key):
    one, other = jax.random.split(key)
    noise = jax.random.normal(one, b["x"].shape)
    t = jax.random.uniform(other, (len(b["x"]), 1))
    return jnp.mean(((jnp.cos(t) * b["x"] + jnp.sin(t) * noise) @ p["w1"] - noise) ** 2)


def key_for_each(p, b, key):
    keys = jax.random.split(key, len(b["x"]))
    noisy = jax.vmap(lambda k, x: x + jax.random.normal(k, x.shape))(keys, b["x"])
    return jnp.mean(noisy @ p["w1"])


def key_by_number(p, b, key):
    draw = lambda i, x: x * jax.random.normal(jax.random.fold_in(key, i))
    return jnp.mean(jax.vmap(draw)(jnp.arange(len(b["x"])), b["x"]) @ p["w1"])


RANDOM = [dropout, dropout_over_layers, diffusion, key_for_each, key_by_number]


@pytest.mark.parametrize("loss", RANDOM)
def test_draws_for_each_example_are_its_own(loss):
    grads = jax.jit(jg.grad(loss, microbatches=2))(PARAMS, BATCH, KEY)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], BATCH) for i in (0, 2)]
    both = [jax.grad(loss)(PARAMS, *of) for of in zip(parts, jax.random.split(KEY), strict=True)]
    same(grads, jax.tree.map(lambda a, b: (a + b) / 2, *both))
    assert jax.tree.leaves(jg.per_example_grads(loss)(PARAMS, BATCH, KEY))[0].shape[0] == ROWS


def test_a_sum_over_rows_has_gradients_of_each():
    loss = lambda p, b: each(p, b).sum()
    grads = jg.per_example_grads(loss)(PARAMS, BATCH)
    same(jax.tree.map(lambda g: g.sum(0), grads), jax.grad(loss)(PARAMS, BATCH))


# What mixes.


def contrastive(p, b):
    a, c = b["x"] @ p["w1"], b["series"][:, 0]
    scores = a @ c.T
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.arange(len(a))).mean()


def batch_norm(p, b):
    x = b["x"] @ p["w1"]
    x = (x - x.mean(0, keepdims=True)) / (x.std(0, keepdims=True) + 1e-5)
    return jnp.mean(jnp.tanh(x) ** 2)


def mixup(p, b):
    return jnp.mean(jnp.tanh((0.7 * b["x"] + 0.3 * b["x"][::-1]) @ p["w1"]))


def mixup_by_key(p, b):
    x = jax.random.permutation(KEY, b["x"])
    return jnp.mean(jnp.tanh((0.7 * b["x"] + 0.3 * x) @ p["w1"]))


def running(p, b):
    def step(h, x):
        return jnp.tanh(x @ p["w1"] + h), h.sum()

    return jnp.mean(lax.scan(step, jnp.zeros(WIDTH), b["x"])[1])


def group_means(p, b):
    sums = jax.ops.segment_sum(each(p, b), b["group"], 2)
    return jnp.max(sums / 2)


def decorrelation(p, b):
    x = b["x"] @ p["w1"]
    return jnp.sum((x.T @ x / len(x) - jnp.eye(WIDTH)) ** 2)


MIXING = {
    "BatchNorm by hand": (batch_norm, "combines each example with a sum over all of them"),
    "BatchNorm of nnx": (lambda: of_nnx(train=True), "test_rows.py"),
    "in-batch negatives": (contrastive, "multiplies each example with the others"),
    "softmax over the batch": (
        lambda p, b: -jnp.mean(jax.nn.log_softmax(each(p, b)[:, None], 0)),
        "reduces over the examples",
    ),
    "the worst example": (lambda p, b: each(p, b).max(), "reduces over the examples"),
    "the hardest examples": (
        lambda p, b: jnp.sort(each(p, b))[-2:].mean(),
        "sorts the examples|is not the same at",
    ),
    "the hardest examples by top k": (
        lambda p, b: lax.top_k(each(p, b), 2)[0].mean(),
        "picks some examples of the batch",
    ),
    "the median": (lambda p, b: jnp.median(each(p, b)), "reduces over the examples"),
    "root of the mean": (
        lambda p, b: jnp.sqrt(jnp.mean((logits(p, b) - b["y"]) ** 2)),
        "sqrt at .* is applied to a sum over the examples .*, and is not linear in it",
    ),
    "variance": (lambda p, b: each(p, b).mean() + each(p, b).var(), "with a sum over all of them"),
    "log of the mean": (
        lambda p, b: jnp.log(jnp.mean(jnp.exp(each(p, b)))),
        "log at .* is applied to a sum over the examples",
    ),
    "correlation with the labels": (
        lambda p, b: jnp.mean(logits(p, b) * b["y"]) / jnp.sqrt(jnp.mean(logits(p, b) ** 2)),
        "sqrt at .* is applied to a sum over the examples",
    ),
    "covariance of the features": (decorrelation, "not linear in it"),
    "all pairs": (
        lambda p, b: jnp.mean(jnp.abs(logits(p, b)[:, None] - logits(p, b)[None])),
        "examples lie along different axes",
    ),
    "mixup": (mixup, "rev at .* reverses the order of the examples"),
    "mixup by a permutation": (mixup_by_key, "sort at .* uses an example's position"),
    "the next example": (
        lambda p, b: jnp.mean(logits(p, b) * jnp.roll(logits(p, b), 1, 0)),
        "picks some examples of the batch",
    ),
    "a recurrence over the examples": (running, "steps through the examples"),
    "cumulative mean": (
        lambda p, b: jnp.mean(jnp.cumsum(each(p, b)) ** 2),
        "accumulates along the examples",
    ),
    "means of groups": (group_means, "scatter-add at .* writes"),
    "the first example": (
        lambda p, b: jnp.mean((logits(p, b) - logits(p, b)[:1]) ** 2),
        "picks some examples of the batch",
    ),
    "by position": (
        lambda p, b: jnp.mean(each(p, b) * jnp.arange(len(b["x"]))),
        "uses an example's position in the batch",
    ),
    "soft F1": (
        lambda p, b: (
            2
            * jnp.sum(jax.nn.sigmoid(logits(p, b)) * b["y"])
            / jnp.sum(jax.nn.sigmoid(logits(p, b)) + b["y"])
        ),
        "divides by a sum over the examples .* that has a gradient itself",
    ),
    "another function of larger batches": (
        lambda p, b: each(p, b).mean() if len(b["x"]) < ROWS else each(p, b).mean() * 2,
        "is not the same at|can't be traced",
    ),
    "a callback": (
        lambda p, b: jnp.mean(
            jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(b["x"].shape, "float32"), b["x"])
            @ p["w1"]
        ),
        "pure_callback at .* calls a Python function, which may do anything with the batch",
    ),
}


def message(fun, *args):
    with pytest.raises(jg.GradientError) as info:
        fun(*args)
    return str(info.value)


@pytest.mark.parametrize("name", MIXING)
def test_a_loss_that_mixes_is_refused_with_its_line_and_what_to_do(name):
    entry, reason = MIXING[name]
    loss, params = problem(entry)
    for fun, start in (
        (
            jg.grad(loss, microbatches=2),
            "microbatches=2 takes the mean over the parts of the batch",
        ),
        (jg.per_example_grads(loss), "per_example_grads takes each example by itself"),
        (jg.grad_norms(loss), "grad_norms takes each example by itself"),
    ):
        if name == "another function of larger batches" and "microbatches" not in start:
            continue  # at one row it can't be compared
        text = message(jax.jit(fun), params, BATCH)
        assert text.startswith(start)
        assert re.search(reason, text), text
        assert "test_rows.py" in text or "can't be traced" in text or "is not the same" in text
        assert text.endswith("say so: rows='independent'.")


def test_the_user_says_otherwise():
    check = lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    loss = lambda p, b: jnp.mean(each(p, b | {"x": lax.stop_gradient(check(b["x"]))}))
    plain = jax.grad(lambda p, b: each(p, b).mean())(PARAMS, BATCH)
    assert "pure_callback" in message(jg.grad(loss, microbatches=2), PARAMS, BATCH)
    same(jg.grad(loss, microbatches=2, rows="independent")(PARAMS, BATCH), plain)


# What is weighted.


def token_mean(p, b):
    return jnp.sum(per_token(p, b) * b["mask"]) / jnp.sum(b["mask"])


def tokens(b):
    return jnp.sum(b["mask"])


def guarded(p, b):
    return jnp.sum(per_token(p, b) * b["mask"]) / jnp.maximum(jnp.sum(b["mask"]), 1)


def nothing_of_no_tokens(p, b):
    count = jnp.sum(b["mask"])
    mean = jnp.sum(per_token(p, b) * b["mask"]) / jnp.where(count > 0, count, 1)
    return jnp.where(count > 0, mean, 0.0)


WEIGHTED = {
    "a mean over tokens": token_mean,
    "by jnp.mean(where=)": lambda p, b: jnp.mean(per_token(p, b), where=b["mask"] > 0),
    "by jnp.average": lambda p, b: jnp.average(per_token(p, b), weights=b["mask"]),
    "weights that add up to one": lambda p, b: jnp.sum(
        per_token(p, b) * (b["mask"] / jnp.sum(b["mask"]))
    ),
    "mean by mean": lambda p, b: jnp.mean(per_token(p, b) * b["mask"]) / jnp.mean(b["mask"]),
    "with a small number": lambda p, b: (
        jnp.sum(per_token(p, b) * b["mask"]) / (jnp.sum(b["mask"]) + 1e-9)
    ),
    "by at least one": guarded,
    "nothing of no tokens": nothing_of_no_tokens,
    "with a penalty": lambda p, b: token_mean(p, b) + 0.1 * jnp.sum(p["w1"] ** 2),
    "two of them": lambda p, b: token_mean(p, b) + 0.1 * guarded(p, b),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_mean_over_tokens_needs_its_weights(name):
    loss = WEIGHTED[name]
    value, grads = jax.value_and_grad(loss)(PARAMS, BATCH)
    text = message(jg.grad(loss, microbatches=2), PARAMS, BATCH)
    assert "it divides a sum over them (reduce_sum at " in text
    assert "by a count over the batch. Pass this count for a part, weight=lambda batch: " in text
    text = message(jg.per_example_grads(loss), PARAMS, BATCH)
    assert "Divide in each row by its own count, and take the mean of the rows: " in text
    weighted = jax.jit(jg.value_and_grad(loss, microbatches=4, weight=tokens))
    got, of_parts = weighted(PARAMS, BATCH)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    same(of_parts, grads)


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_part_without_tokens_is_left_out(name):
    loss, batch = WEIGHTED[name], BATCH | {"mask": BATCH["mask"].at[1].set(0.0)}
    value, grads = jax.value_and_grad(loss)(PARAMS, batch)
    got, of_parts = jg.value_and_grad(loss, microbatches=4, weight=tokens)(PARAMS, batch)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    same(of_parts, grads)


def test_without_any_weight_the_loss_says_what_it_is():
    batch = BATCH | {"mask": jnp.zeros_like(BATCH["mask"])}
    for loss in (token_mean, guarded):
        value, grads = jax.value_and_grad(loss)(PARAMS, batch)
        got, of_parts = jg.value_and_grad(loss, microbatches=2, weight=tokens)(PARAMS, batch)
        np.testing.assert_equal(float(got), float(value))
        np.testing.assert_array_equal(of_parts["w1"], grads["w1"])


def test_equal_weights_are_no_weights():
    loss = lambda p, b: each(p, b).mean()
    for weight in (lambda b: 1.0, lambda b: 3, lambda b: len(b["x"]), lambda b: b["x"].size):
        both = jg.value_and_grad(loss, microbatches=2, weight=weight)(PARAMS, BATCH)
        same(both, jax.value_and_grad(loss)(PARAMS, BATCH))


def test_weights_have_the_arguments_of_the_loss_and_aux_and_taps_stay_of_the_parts():
    def loss(p, x, mask, *, scale):
        out = jg.tap((x @ p["w1"]).mean(-1), "out")
        return scale * jnp.sum(out * mask) / jnp.sum(mask), out

    x, mask = BATCH["series"], BATCH["mask"].at[2].set(0.0)
    options = {"has_aux": True, "taps": True}
    weight = lambda x, mask: mask.sum()
    whole = jg.value_and_grad(loss, "w1", **options)(PARAMS, x, mask, scale=2.0)
    fun = jg.value_and_grad(loss, "w1", microbatches=4, weight=weight, **options)
    (value, out), (grads, taps) = fun(PARAMS, x, mask, scale=2.0)
    np.testing.assert_allclose(value, whole[0][0], rtol=1e-5)
    same(grads, whole[1][0])
    np.testing.assert_allclose(out.reshape(ROWS, TIME), whole[0][1], rtol=1e-5, atol=1e-6)
    same(taps["out"].reshape(ROWS, TIME), whole[1][1]["out"])


def test_weights_of_half_precision_add_up_in_full():
    loss = lambda p, x, m: jnp.sum(p * x * m) / jnp.sum(m)
    x, m = jnp.ones((512, 1), "bfloat16"), jnp.ones((512, 1), "bfloat16")
    fun = jg.value_and_grad(loss, microbatches=512, weight=lambda x, m: m.sum())
    value, grads = fun(jnp.ones((), "bfloat16"), x, m)
    assert (value, grads) == (1.0, 1.0)
    assert value.dtype == grads.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("loss", "weight", "text"),
    [
        (
            token_mean,
            lambda b: jnp.maximum(tokens(b), 1),
            r"but max at .* is not a sum over its examples\.",
        ),
        (token_mean, lambda b: b["mask"].max(), "reduce_max at .* reduces over the examples"),
        (token_mean, lambda b: b["mask"], r"weight returns float32\[1,6\]; it must return a real"),
        (token_mean, lambda b: None, "weight returns NoneType; it must return a real scalar"),
        (
            token_mean,
            lambda p, b: 1.0,
            "weight is called with the positional arguments of the loss",
        ),
        (lambda p, b: each(p, b).sum(), tokens, "it is a sum over them .* that is not divided by"),
        (
            lambda p, b: token_mean(p, b) + each(p, b).mean(),
            tokens,
            "not all of its terms are means over the examples",
        ),
        (batch_norm, tokens, "combines each example with a sum over all of them"),
    ],
)
def test_weights_that_are_none(loss, weight, text):
    got = message(jg.grad(loss, microbatches=4, weight=weight), PARAMS, BATCH)
    assert re.search(text, got), got


def test_options_are_checked_when_they_are_given():
    loss = lambda p, b: each(p, b).mean()
    assert message(lambda: jg.grad(loss, weight=tokens)) == (
        "weight says how much each part of a batch counts, and the batch is not split: pass "
        "microbatches= too."
    )
    for wrong in (
        lambda: jg.grad(loss, microbatches=2, rows="free"),
        lambda: jg.per_example_grads(loss, rows="free"),
    ):
        assert message(wrong).startswith("rows='free'; it must be 'checked', or 'independent' to")


def test_what_a_sum_is_told():
    text = message(jg.grad(lambda p, b: each(p, b).sum(), microbatches=2), PARAMS, BATCH)
    assert re.search(
        r"but it is a sum over them \(reduce_sum at .*test_rows.py:\d+.*\) that is not divided by "
        "their number. Divide each sum over the examples by their number, as jnp.mean does.",
        text,
    )


def test_a_step_costs_nothing_more():
    loss = lambda p, b: each(p, b).mean()
    checked, trusted = (
        jax.make_jaxpr(jg.grad(loss, microbatches=2, rows=rows))(PARAMS, BATCH)
        for rows in ("checked", "independent")
    )
    assert str(checked) == str(trusted)
