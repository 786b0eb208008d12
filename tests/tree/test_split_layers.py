import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad._jaxpr.views import Scan, view
from jaxgrad._staging import min_cut

LAYERS = 6


def make():
    draw = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(0.3 * draw.normal(size=shape), jnp.float32)
    params = {
        "blocks": {"w": array(LAYERS, 8, 8), "b": array(LAYERS, 8)},
        "head": array(8, 2),
    }
    data = {"x": array(20, 8), "y": array(20, 2)}

    def loss(params, batch):
        layer = lambda h, p: (h + jnp.tanh(h @ p["w"] + p["b"][None]), None)
        h, _ = jax.lax.scan(layer, batch["x"], params["blocks"])
        return jnp.mean((h @ params["head"] - batch["y"]) ** 2)

    return loss, params, data


def test_join_undoes_split():
    _, params, _ = make()
    split, join = jg.split_layers(params, "blocks/**", last=2)
    assert jg.paths(split) == [
        "blocks/b/first",
        "blocks/b/last",
        "blocks/w/first",
        "blocks/w/last",
        "head",
    ]
    assert split["blocks"]["w"]["last"].shape == (2, 8, 8)
    jax.tree.map(np.testing.assert_array_equal, join(split), params)


def test_gradients_are_those_of_the_last_layers():
    loss, params, data = make()
    split, join = jg.split_layers(params, "blocks/**", last=2)
    grads = jax.jit(jg.grad(lambda p, b: loss(join(p), b), ["**/last", "head"]))(split, data)
    whole = jax.grad(loss)(params, data)
    assert grads["blocks"]["w"]["first"] is None
    np.testing.assert_allclose(grads["blocks"]["w"]["last"], whole["blocks"]["w"][-2:], rtol=1e-5)
    np.testing.assert_allclose(grads["head"], whole["head"], rtol=1e-5)


@pytest.mark.parametrize("last", [1, 2, 5])
def test_the_first_layers_are_staged(monkeypatch, last):
    monkeypatch.setattr(min_cut, "FLOPS_PER_BYTE", 1e-6)
    loss, params, data = make()
    split, join = jg.split_layers(params, "blocks/**", last=last)
    of_split = lambda p, b: loss(join(p), b)
    wrt = ["**/last", "head"]
    staged = jg.stage(of_split, split, jax.tree.map(lambda x: x[:5], data), wrt)
    trainable, _ = jg.partition(split, wrt)
    features = staged.prepare(data)[3:10]
    batch = jax.tree.map(lambda x: x[3:10], data)
    value, grads = jax.value_and_grad(staged.loss)(trainable, features)
    expected, full = jg.value_and_grad(of_split, wrt)(split, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, full)
    eqns = jax.make_jaxpr(staged.loss)(trainable, features).eqns
    assert [v.length for e in eqns if isinstance(v := view(e), Scan)] == [last]


@pytest.mark.parametrize(
    ("wrt", "last", "text"),
    [
        ("blocks/**", 0, "last=0 of 6 layers; it must be from 1 to 5."),
        ("blocks/**", 6, "last=6 of 6 layers; it must be from 1 to 5."),
        (
            ["blocks/w", "head"],
            1,
            "stacked leaves must have one number of layers, but 'blocks/w' has 6, 'head' has 8.",
        ),
        (
            lambda path, leaf: False,
            1,
            "wrt selects no leaf: a predicate.",
        ),
        ("block/**", 1, "wrt pattern 'block/**' matches no leaf. Did you mean"),
    ],
)
def test_what_can_not_be_split(wrt, last, text):
    with pytest.raises(jg.SelectionError) as info:
        jg.split_layers(make()[1], wrt, last=last)
    assert text in str(info.value)
    with pytest.raises(jg.SelectionError, match=r"'a' is float32\[\]: it has no axis of layers"):
        jg.split_layers({"a": jnp.ones(())}, "a", last=1)
