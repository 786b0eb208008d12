import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad._tree import select as _select

PARAMS = {
    "head": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))},
    "trunk": [jnp.ones(12), 3.0],
}


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["trunk"][0].reshape(4, 3)) * params["trunk"][1]
    out = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
    return jnp.mean((out - batch["y"]) ** 2)


BATCH = {"x": np.ones((6, 4), np.float32), "y": np.ones((6, 2), np.float32)}


def test_its_repr_says_how_much_is_trained():
    assert (
        repr(jg.select(PARAMS, "head")) == "<Selection: 8 of 20 elements (40%), in 2 of 3 leaves>"
    )


def test_it_holds_shapes_and_no_arrays():
    selection = jg.select(PARAMS, "head")
    assert not any(isinstance(x, jax.Array) for x in selection.flat.leaves)
    assert selection.flat.leaves[1] == jax.ShapeDtypeStruct((3, 2), jnp.float32)


def test_split_merge_and_map():
    selection = jg.select(PARAMS, "head")
    selected, rest = selection.split(PARAMS)
    assert jg.paths(selected) == selection.paths == ["head/bias", "head/kernel"]
    assert selection.merge(rest, selected) == PARAMS
    doubled = selection.map(lambda x: 2 * x, PARAMS)
    assert doubled["head"]["bias"].tolist() == [2.0, 2.0]
    assert doubled["trunk"] == PARAMS["trunk"]
    assert jax.tree.structure(doubled) == jax.tree.structure(PARAMS)


def test_map_leaves_what_is_not_an_array():
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    zeroed = jg.select(mlp, "**").map(jnp.zeros_like, mlp)
    assert zeroed.activation is mlp.activation
    assert not zeroed.layers[0].weight.any()


def test_equal_selections_are_equal_and_hash_alike():
    one, other = jg.select(PARAMS, "head"), jg.select(PARAMS, ["**", "!trunk"])
    assert one == other
    assert hash(one) == hash(other)
    assert one != jg.select(PARAMS, "trunk")
    assert one != jg.select(PARAMS | {"head": jnp.ones(2)}, "head")
    assert one != "head"


def test_a_selection_comes_out_of_a_jitted_function():
    selection = jax.jit(lambda params: jg.select(params, "head"))(PARAMS)
    assert selection.paths == ["head/bias", "head/kernel"]


@pytest.mark.parametrize(
    "call",
    [
        lambda wrt: jg.grad(loss, wrt)(PARAMS, BATCH),
        lambda wrt: jg.backward(loss, PARAMS, BATCH, wrt=wrt),
        lambda wrt: jg.per_example_grads(loss, wrt)(PARAMS, BATCH),
        lambda wrt: jg.grad_norms(loss, wrt)(PARAMS, BATCH),
        lambda wrt: jg.stop_gradient(PARAMS, wrt),
        lambda wrt: jg.partition(PARAMS, wrt),
        lambda wrt: jg.param_groups([(wrt, optax.sgd(1.0))]).assign(PARAMS).wrt.mask,
        lambda wrt: str(jg.check_grads(loss, PARAMS, BATCH, wrt=wrt)),
        lambda wrt: jg.find_nonfinite(loss, PARAMS, BATCH, wrt=wrt),
        lambda wrt: str(jg.audit(loss, PARAMS, BATCH, optax.sgd(0.1), wrt).leaks),
        lambda wrt: str(jg.graph(loss, PARAMS, BATCH, wrt=wrt)),
        lambda wrt: str(jg.stage(loss, PARAMS, BATCH, wrt).report()),
        lambda wrt: jg.fit(loss, PARAMS, BATCH, optax.sgd(0.1), wrt=wrt, progress=False).params,
    ],
)
def test_every_wrt_takes_a_selection(call):
    by_glob, by_selection = call("head"), call(jg.select(PARAMS, "head"))
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), by_glob, by_selection)
    assert jax.tree.all(same)


def test_a_selection_serves_another_container_with_the_same_paths():
    other = {"trunk": tuple(PARAMS["trunk"]), "head": dict(PARAMS["head"])}
    assert jg.select(other, jg.select(PARAMS, "head")).paths == ["head/bias", "head/kernel"]


def test_a_selection_of_another_tree_is_refused():
    with pytest.raises(jg.SelectionError) as info:
        jg.partition(PARAMS | {"new": jnp.ones(2)}, jg.select(PARAMS, "head"))
    assert str(info.value) == (
        "the selection was made for another tree: it does not have 'new'. "
        "Select from this tree: jaxgrad.select(tree, wrt)."
    )


def test_split_refuses_another_structure():
    with pytest.raises(jg.SelectionError, match="the tree has 1 leaf that the selection lacks"):
        jg.select(PARAMS, "head").split(PARAMS | {"new": jnp.ones(2)})


def test_fit_resolves_wrt_once_and_names_leaves_at_most_eight_times(monkeypatch):
    named, resolved = [], []
    walk = jax.tree_util.tree_flatten_with_path
    match = _select.match

    def counted_walk(*args, **kwargs):
        if inspect.stack(0)[1].filename.rpartition("/jaxgrad/")[1]:
            named.append(inspect.stack(0)[1].filename)
        return walk(*args, **kwargs)

    def counted_match(flat, wrt):
        if wrt == "head":
            resolved.append(wrt)
        return match(flat, wrt)

    monkeypatch.setattr(jax.tree_util, "tree_flatten_with_path", counted_walk)
    monkeypatch.setattr(_select, "match", counted_match)
    jg.fit(loss, PARAMS, BATCH, optax.sgd(0.1), wrt="head", epochs=3, batch_size=3, progress=False)
    assert len(resolved) == 1
    assert 0 < len(named) <= 8, named
