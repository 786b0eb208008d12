import jax
import jax.numpy as jnp
import pytest

import jaxgrad as jg
from jaxgrad._staging import min_cut


@pytest.fixture(autouse=True)
def _prices(monkeypatch):
    monkeypatch.setattr(min_cut, "BYTES_PER_READ", 0)


def crossing(loss, params, batch, wrt):
    return [
        (c.source.split(" at ")[0], c.shape, str(c.dtype))
        for c in jg.stage(loss, params, batch, wrt).report().crossing
    ]


def deep(h, w):
    for _ in range(60):
        h = jnp.tanh(h @ w)
    return h


W = jnp.eye(8)


def test_a_label_is_stored_and_not_its_one_hot():
    def loss(params, batch):
        logits = deep(batch["x"], params["w"]) @ params["head"]
        return jnp.mean(jax.nn.one_hot(batch["y"], 50) * logits)

    batch = {"x": jnp.ones((4, 8)), "y": jnp.zeros(4, int)}
    params = {"w": W, "head": jnp.ones((8, 50))}
    assert crossing(loss, params, batch, "head") == [
        ("from tanh", (8,), "float32"),
        ("the batch's 'y'", (), "int32"),
    ]


def test_bytes_are_read_rather_than_floats():
    def loss(params, batch):
        x = batch.astype(jnp.float32) / 255
        return jnp.mean((x @ params) ** 2)

    assert crossing(loss, W, jnp.ones((4, 8), jnp.uint8), "**") == [
        ("the batch's array", (8,), "uint8")
    ]


def test_what_is_cheap_to_compute_again_is_not_stored_wide():
    def loss(params, batch):
        h = deep(batch, params["w"])
        wide = jnp.broadcast_to(jnp.exp(h)[:, :, None], (*h.shape, 100))
        return jnp.mean(wide * params["head"])

    params = {"w": W, "head": jnp.ones((1, 8, 100))}
    ((_, shape, _),) = crossing(loss, params, jnp.ones((4, 8)), "head")
    assert shape in ((8,), (8, 1))


def test_cheap_layers_are_computed_again_and_dear_ones_are_not():
    def loss(params, batch, layers):
        h = batch
        for _ in range(layers):
            h = jnp.tanh(h @ params["w"])
        h = jnp.concatenate([h] * 20, 1) * 2 + jnp.cos(batch).repeat(20, 1)
        return jnp.mean(h @ params["head"])

    params = {"w": W, "head": jnp.ones((160, 1))}
    few, many = (
        crossing(lambda p, b, n=n: loss(p, b, n), params, jnp.ones((4, 8)), "head") for n in (1, 60)
    )
    assert [c[0] for c in few] == ["the batch's array"]
    assert {c[0] for c in many} == {"from tanh", "from cos"}
