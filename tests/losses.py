"""Losses of many makes, each with its parameters, data and the selections to stage it with."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import CNN, ViT

ROWS = 10  # no multiple of a batch of 6: the last batch is short


class Case(NamedTuple):
    loss: Callable[..., Any]
    params: Any
    data: Any
    wrt: Any


def cross_entropy(logits, labels):
    hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * hot, -1))


def draw(*shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.zeros(()).dtype) / max(shape[0], 1) ** 0.5


def vectors(width=5):
    return {"x": draw(ROWS, width, seed=1) * 3, "y": jnp.arange(ROWS) % 3}


def pictures(side=8):
    return {"x": draw(ROWS, side, side, 1, seed=1) * 3, "y": jnp.arange(ROWS) % 3}


def dense(p, x):
    return x @ p["w"] + p["b"][None]


def layer(a, b, seed=0):
    return {"w": draw(a, b, seed=seed), "b": draw(b, seed=seed + 1) / 10}


def in_dtype(tree):
    """Flax and Equinox draw float32 where they are not told otherwise."""
    dtype = jnp.zeros(()).dtype
    is_float = eqx.is_inexact_array
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def mlp(wrt="c"):
    params = {"a": layer(5, 8, 1), "b": layer(8, 6, 3), "c": layer(6, 3, 5)}

    def loss(p, batch):
        h = jax.nn.relu(dense(p["a"], batch["x"]))
        return cross_entropy(dense(p["c"], jnp.tanh(dense(p["b"], h))), batch["y"])

    return Case(loss, params, vectors(), f"{wrt}/**")


def below_frozen():
    """A frozen layer above a trained one: its backward stays."""
    return mlp("b")


def flax_model(model, data, wrt):
    apply, params = jg.functional(in_dtype(model))

    def loss(p, batch):
        return cross_entropy(apply(p, batch["x"]), batch["y"])

    return Case(loss, in_dtype(params), data, wrt)


def cnn():
    return flax_model(CNN(1, (4, 6), 3, rngs=nnx.Rngs(0)), pictures(), "head/**")


def vit(wrt):
    model = ViT((8, 8, 1), patch=4, width=8, depth=3, heads=2, classes=3, rngs=nnx.Rngs(0))
    return flax_model(model, pictures(), wrt)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(5, 7, rngs=rngs)
        self.norm = nnx.LayerNorm(7, rngs=rngs)
        self.head = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.gelu(self.norm(self.trunk(x))))


def nnx_module():
    """The module itself as the tree of parameters."""

    def loss(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"])

    return Case(loss, in_dtype(NnxNet(nnx.Rngs(0))), vectors(), "head/**")


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(x)


def linen_module():
    model, data = LinenNet(), pictures()
    variables = in_dtype(model.init(jax.random.key(0), data["x"]))

    def loss(params, batch):
        v = {**variables, "params": params}
        return cross_entropy(model.apply(v, batch["x"]), batch["y"])

    return Case(loss, variables["params"], data, "head/**")


def equinox_module():
    model = in_dtype(eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0)))

    def loss(model, batch):
        return cross_entropy(jax.vmap(model)(batch["x"]), batch["y"])

    return Case(loss, model, vectors(), "layers/2/**")


def scanned_layers(wrt):
    """Residual layers stacked along axis 0; the first four in one array, the others in another."""
    params = {
        "first": {"w": draw(4, 5, 5), "b": draw(4, 5)},
        "last": {"w": draw(2, 5, 5, seed=2), "b": draw(2, 5, seed=3)},
        "head": draw(5, 3),
    }

    def loss(p, batch):
        stack = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), p["first"], p["last"])
        h, _ = jax.lax.scan(lambda h, q: (h + jnp.tanh(dense(q, h)), None), batch["x"], stack)
        return cross_entropy(h @ p["head"], batch["y"])

    return Case(loss, params, vectors(), wrt)


def checkpointed():
    """A checkpoint that holds a frozen and a trained layer."""
    params = {"a": layer(5, 8, 1), "b": layer(8, 6, 3), "c": layer(6, 3, 5)}

    @jax.checkpoint
    def block(p, x):
        return jnp.sin(dense(p["b"], jax.nn.silu(dense(p["a"], x))))

    def loss(p, batch):
        return cross_entropy(dense(p["c"], block(p, batch["x"])), batch["y"])

    return Case(loss, params, vectors(), ["b/**", "c/**"])


def two_towers():
    params = {"left": layer(5, 4, 1), "right": layer(5, 4, 3)}
    data = {"x": draw(ROWS, 5), "z": draw(ROWS, 5, seed=7)}

    def loss(p, batch):
        left, right = (
            jax.nn.standardize(jnp.tanh(dense(p[name], batch[x])), axis=-1)
            for name, x in (("left", "x"), ("right", "z"))
        )
        return cross_entropy(left @ right.T, jnp.arange(left.shape[0]) % 4)

    return Case(loss, params, data, "right/**")


def shared_weight():
    """One layer used on a frozen path and on a trained one."""
    params = {"shared": layer(5, 5, 1), "trained": layer(5, 5, 3), "head": layer(5, 3, 5)}

    def loss(p, batch):
        h = jnp.tanh(dense(p["shared"], batch["x"]))
        h = jnp.tanh(dense(p["trained"], h))
        return cross_entropy(dense(p["head"], jnp.tanh(dense(p["shared"], h))), batch["y"])

    return Case(loss, params, vectors(), ["trained/**", "head/**"])


def auxiliary():
    case = mlp()

    def loss(p, batch):
        h = jnp.tanh(dense(p["a"], batch["x"]))
        return case.loss(p, batch), {"hidden": h, "scale": jnp.sum(p["a"]["w"]), "step": 3}

    return case._replace(loss=loss)


def vmapped():
    case = mlp()

    def one(p, x, y):
        h = jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"])
        logits = jnp.tanh(h @ p["b"]["w"]) @ p["c"]["w"] + p["c"]["b"]
        return -jax.nn.log_softmax(logits)[y]

    def loss(p, batch):
        return jnp.mean(jax.vmap(functools.partial(one, p))(batch["x"], batch["y"]))

    return case._replace(loss=loss)


def folded_weights():
    """Frozen weights that are merged before use; an embedding; frames folded into the batch."""
    params = {"a": draw(5, 2), "b": draw(2, 6), "table": draw(3, 6), "head": layer(6, 3, 5)}
    data = {**vectors(), "x": draw(ROWS, 4, 5)}

    def loss(p, batch):
        frames = batch["x"].reshape(-1, 5) @ (p["a"] @ p["b"])
        h = jnp.tanh(frames.reshape(-1, 4, 6).swapaxes(0, 1).max(0) + p["table"][batch["y"]])
        return cross_entropy(dense(p["head"], h), batch["y"])

    return Case(loss, params, data, "head/**")


def custom_derivative():
    """A clipped gradient above and below the trained layer."""

    @jax.custom_vjp
    def clip(x):
        return jnp.sin(x)

    clip.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.clip(g * jnp.cos(x), -0.01, 0.01),))
    case = mlp("b")

    def loss(p, batch):
        h = clip(dense(p["a"], batch["x"]))
        return cross_entropy(dense(p["c"], clip(dense(p["b"], h))), batch["y"])

    return case._replace(loss=loss)


def loops():
    """Frozen `scan`, `while`, `cond` and `map` over the examples."""
    params = {"w": draw(5, 5), "steps": jnp.asarray(3), "head": layer(5, 3, 5)}

    def loss(p, batch):
        h, sums = jax.lax.scan(
            lambda h, k: (jnp.tanh(h @ p["w"]) * k, h.sum(-1)), batch["x"], draw(4)
        )
        h = jax.lax.fori_loop(0, p["steps"], lambda i, h: jnp.cos(h @ p["w"]), h)
        h = jax.lax.cond(p["steps"] > 2, lambda h: h * 2, jnp.sin, h + sums.sum(0)[:, None])
        h = jax.lax.map(lambda row: jnp.sort(row) / jnp.linalg.norm(row), h)
        return cross_entropy(dense(p["head"], h), batch["y"])

    return Case(loss, params, vectors(), "head/**")


CASES = {
    "MLP, head": mlp,
    "MLP, frozen above trained": below_frozen,
    "CNN with BatchNorm in inference": cnn,
    "ViT, head": lambda: vit("head/**"),
    "ViT, last block": lambda: vit(["layers/2/**", "norm/**", "head/**"]),
    "ViT, biases": lambda: vit("**/bias"),
    "NNX module": nnx_module,
    "Linen module": linen_module,
    "Equinox module": equinox_module,
    "scanned layers, last ones": lambda: scanned_layers(["last/**", "head"]),
    "scanned layers, head": lambda: scanned_layers("head"),
    "checkpoint": checkpointed,
    "two towers": two_towers,
    "shared weight": shared_weight,
    "auxiliary outputs": auxiliary,
    "vmap per example": vmapped,
    "folded weights": folded_weights,
    "custom derivative": custom_derivative,
    "loops": loops,
}
