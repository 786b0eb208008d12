import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad._optim.parts import Part, parts_of, slots_of

PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(2), "c": [jnp.ones(2)]}
SCHEDULE = optax.linear_schedule(0, 1, 10)


def parts(tx, params=PARAMS):
    return dict(parts_of(tx.init(params), params))


def test_a_part_is_a_tree_of_leaves_or_serves_several():
    assert parts(optax.chain(optax.clip(1.0), optax.adam(SCHEDULE))) == {
        "1/0/count": Part("ScaleByAdamState.count", ()),
        "1/0/mu": Part("ScaleByAdamState.mu", None),
        "1/0/nu": Part("ScaleByAdamState.nu", None),
        "1/1/count": Part("ScaleByScheduleState.count", ()),
    }


def test_a_counter_serves_its_group_or_the_leaves_beside_it():
    groups = jg.param_groups({"a": optax.sgd(SCHEDULE), "[bc]": optax.adam(0.1)})
    assert parts(groups) == {
        "groups/0/1/count": Part("ScaleByScheduleState.count", ("a",)),
        "groups/1/0/count": Part("ScaleByAdamState.count", ("b", "c/0")),
        "groups/1/0/mu": Part("ScaleByAdamState.mu", None),
        "groups/1/0/nu": Part("ScaleByAdamState.nu", None),
    }
    mask = {"a": True, "b": False, "c": False}
    assert parts(optax.masked(optax.lion(0.1), mask))["inner_state/0/count"].serves == ("a",)
    half = jg.partition(PARAMS, "!c")[0]
    nested = jg.param_groups([(["a", "b"], jg.param_groups({"b": optax.sgd(SCHEDULE)}))])
    assert parts(nested, half) == {
        "groups/0/groups/0/1/count": Part("ScaleByScheduleState.count", ("b",))
    }


def test_a_leaf_may_have_several_arrays():
    state = optax.scale_by_sm3().init(PARAMS)
    found = slots_of(jg.paths(state), parts_of(state, PARAMS), tuple(jg.paths(PARAMS)))
    assert [(s.path, s.kind, s.leaf) for s in found[:3]] == [
        ("mu/a/0", "ScaleBySM3State.mu/0", "a"),
        ("mu/a/1", "ScaleBySM3State.mu/1", "a"),
        ("mu/b/0", "ScaleBySM3State.mu/0", "b"),
    ]


@pytest.mark.parametrize(
    "params",
    [
        (jnp.ones(2), jnp.ones(3)),
        [jnp.ones(2)],
        jnp.ones(2),
        nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
    ],
    ids=["tuple", "list", "array", "NNX state", "NNX module"],
)
def test_any_tree_of_parameters(params):
    state = optax.adam(SCHEDULE).init(params)
    slots = slots_of(jg.paths(state), parts_of(state, params), tuple(jg.paths(params)))
    moments = [s for s in slots if s.kind == "ScaleByAdamState.mu"]
    assert [s.leaf for s in moments] == jg.paths(params)
    assert len(slots) == len(jax.tree.leaves(state))
