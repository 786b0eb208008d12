import dataclasses
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxgrad as jg

TREE = {
    "embed": {"kernel": 1.0, "bias": 2.0},
    "layers": [{"kernel": 3.0}, {"kernel": 4.0, "bias": None}],
    "head": {"kernel": 5.0, "bias": 6.0},
}


def chosen(tree, wrt):
    return jg.paths(jg.partition(tree, wrt)[0])


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, use_bias=False, rngs=rngs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(3, name="trunk")(x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: float
    right: list[float]


@pytest.mark.parametrize(
    ("wrt", "expected"),
    [
        (
            "**",
            [
                *("embed/bias", "embed/kernel", "head/bias", "head/kernel"),
                *("layers/0/kernel", "layers/1/kernel"),
            ],
        ),
        ("head/**", ["head/bias", "head/kernel"]),
        ("head/*", ["head/bias", "head/kernel"]),
        ("**/bias", ["embed/bias", "head/bias"]),
        ("*/bias", ["embed/bias", "head/bias"]),
        ("layers/**/kernel", ["layers/0/kernel", "layers/1/kernel"]),
        ("layers/[!0]/kernel", ["layers/1/kernel"]),
        ("layers/?/kernel", ["layers/0/kernel", "layers/1/kernel"]),
        ("!**/kernel", ["embed/bias", "head/bias"]),
        (["head/**", "**/bias"], ["embed/bias", "head/bias", "head/kernel"]),
        (["**", "!layers/**", "!head/bias"], ["embed/bias", "embed/kernel", "head/kernel"]),
        (lambda path, leaf: leaf > 4, ["head/bias", "head/kernel"]),
        (lambda path, leaf: np.bool_(path.startswith("embed")), ["embed/bias", "embed/kernel"]),
        ({"embed": False, "layers": False, "head": True}, ["head/bias", "head/kernel"]),
        (
            {"embed": {"kernel": True, "bias": False}, "layers": [False, True], "head": False},
            ["embed/kernel", "layers/1/kernel"],
        ),
    ],
)
def test_every_kind_of_wrt(wrt, expected):
    assert chosen(TREE, wrt) == expected
    selection = jg.select(TREE, wrt)
    assert selection.paths == expected
    assert chosen(TREE, selection) == chosen(TREE, selection.mask) == expected  # each is a wrt


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("head/**", "head", True),
        ("head/**", "header/kernel", False),
        ("**/bias", "bias", True),
        ("**/bias", "a/b/bias", True),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "axb", False),
        ("*", "a/b", True),  # below a node that it matches
        ("a**", "abc", True),
        ("a**", "ab/c", True),
        ("a**", "b/ac", False),
        ("head", "head/kernel", True),
        ("head", "header/kernel", False),
        ("**/bias", "a/bias/b", True),
        ("a[0]", "a[0]", True),  # literally
        ("a[0]", "a[0]/b", True),
        ("a[0]", "a0", True),
        ("a*", "a*", True),
        ("a[[]0]", "a[0]", True),
        ("a.b", "axb", False),
        ("a?b", "a/b", False),
        ("layers/[0-2]/*", "layers/1/kernel", True),
        ("[!a]", "b", True),
        ("[^a]", "b", False),
        ("[^a]", "^", True),
        ("a[!b]", "a/", False),
        ("a[+-0]b", "a/b", False),
        ("a[+-0]b", "a.b", True),
    ],
)
def test_glob_grammar(glob, path, matches):
    # The second leaf matches no glob but its own, so that both outcomes are selections.
    assert (
        (path in chosen({path: 1.0, "other#": 2.0}, ["other#", glob]))
        if matches
        else ("matches no leaf" in error_of(jg.select, {path: 1.0}, glob))
    )


def error_of(fun, *args, error: type[Exception] = jg.SelectionError):
    with pytest.raises(error) as info:
        fun(*args)
    return str(info.value)


def test_a_bare_leaf_has_the_empty_path():
    assert jg.paths(1.0) == [""]
    assert jg.partition(1.0, "**") == (1.0, None)


def nnx_net():
    return Net(nnx.Rngs(0))


TREES = {
    "nnx module": (nnx_net, "head/kernel"),
    "nnx state": (lambda: nnx.state(nnx_net()), "head/kernel"),
    "nnx pure dict": (lambda: nnx.to_pure_dict(nnx.state(nnx_net())), "head/kernel"),
    "linen": (
        lambda: LinenNet().init(jax.random.key(0), jnp.ones((1, 2))),
        "params/head/kernel",
    ),
    "equinox": (
        lambda: eqx.nn.MLP(2, 2, 3, 2, use_final_bias=False, key=jax.random.key(0)),
        "layers/2/weight",
    ),
    "dataclass": (lambda: Pair(1.0, [2.0, 3.0]), "right/1"),
    "nested": (lambda: [[1.0, (2.0, None)], {"a": 3.0}], "0/1/0"),
    "optax state": (
        lambda: optax.sgd(1.0, momentum=0.9).init({"head": jnp.ones(2), "trunk": jnp.ones(3)}),
        "0/trace/head",
    ),
}


@pytest.mark.parametrize("kind", TREES)
def test_any_tree(kind):
    make, path = TREES[kind]
    tree = make()
    selected, rest = jg.partition(tree, path)
    assert jg.paths(selected) == [path]
    assert sorted(jg.paths(selected) + jg.paths(rest)) == sorted(jg.paths(tree))
    assert type(selected) is type(rest) is type(tree)
    for whole in (jg.merge(selected, rest), jg.merge(rest, selected)):
        assert jax.tree.structure(whole) == jax.tree.structure(tree)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True)
        )


def test_what_is_no_array_is_never_selected():
    mlp = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))  # holds its activation as a leaf
    selected, rest = jg.partition(mlp, "**")
    assert selected.activation is None
    assert rest.activation is mlp.activation
    assert jg.merge(selected, rest).activation is mlp.activation
    assert "matches no leaf" not in error_of(jg.select, mlp, "activation")


def test_holes_stay_holes():
    half, _ = jg.partition(TREE, "head/**")
    assert jg.select(half, "head/*").mask == {
        "embed": {"kernel": None, "bias": None},
        "layers": [{"kernel": None}, {"kernel": None, "bias": None}],
        "head": {"kernel": True, "bias": True},
    }
    # The path is there, its leaf is in the other half: no leaf, but no misspelling either.
    assert "selects no leaf" in error_of(jg.select, half, "embed/**")


def test_partition_works_on_halves():
    head, rest = jg.partition(TREE, "head/**")
    embed, layers = jg.partition(rest, "embed/**")
    assert jg.merge(layers, head, embed) == TREE


def test_works_under_jit():
    tree = {"a": jnp.ones(2), "b": jnp.zeros(3)}
    swapped = jax.jit(lambda t: jg.merge(*jg.partition(t, "a")[::-1]))(tree)
    assert jax.tree.map(lambda x, y: bool((x == y).all()), swapped, tree) == {"a": True, "b": True}


leaves = st.one_of(st.floats(allow_nan=False), st.integers(), st.none(), st.booleans())
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text("ab/*[]!", max_size=3), inner, max_size=4),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
)


@given(trees, st.randoms(use_true_random=False))
def test_merge_undoes_partition(tree, random):
    picks = [random.random() < 0.5 for _ in jg.paths(tree)]
    if not any(picks):
        return
    answers = iter(picks)
    selected, rest = jg.partition(tree, lambda path, leaf: next(answers))
    assert len(jg.paths(selected)) == sum(picks)
    assert jg.merge(selected, rest) == tree
    assert jg.merge(rest, selected) == tree


@given(trees, st.data())
def test_a_mask_is_a_wrt(tree, data):
    names = jg.paths(tree)
    if len(names) != len(set(names)) or not names or any(n.startswith("/") for n in names):
        return  # keys with slashes may give two leaves one path
    wanted = data.draw(st.sets(st.sampled_from(names), min_size=1))
    selection = jg.select(tree, lambda path, leaf: path in wanted)
    assert set(chosen(tree, selection)) == set(chosen(tree, selection.mask)) == wanted


PATHS = (
    "'embed/bias', 'embed/kernel', 'head/bias', 'head/kernel', 'layers/0/kernel', "
    "'layers/1/bias', 'layers/1/kernel'"
)


@pytest.mark.parametrize(
    ("wrt", "text"),
    [
        (
            "haed/**",
            "wrt pattern 'haed/**' matches no leaf. Did you mean 'head'",
        ),
        (
            "haed",
            f"wrt pattern 'haed' matches no leaf. Did you mean 'head'? The tree's paths: {PATHS}.",
        ),
        (
            ["head/**", "!hed/bias"],
            "wrt pattern '!hed/bias' matches no leaf. Did you mean '!head/bias' or",
        ),
        ("zzz", f"wrt pattern 'zzz' matches no leaf. The tree's paths: {PATHS}."),
        (
            ["head/**", "!head/**"],
            "wrt selects no leaf: ['head/**', '!head/**']. Nothing would be differentiated or",
        ),
        (lambda path, leaf: False, "wrt selects no leaf: a predicate. Nothing would be"),
        (False, "wrt selects no leaf: False. Nothing would be"),
        (
            lambda path, leaf: 1,
            "wrt gives 1 for 'embed/bias'; it must give True or False. Decide by path,",
        ),
        ({"head": 0.5}, "wrt gives 0.5 for 'head'; it must give True or False."),
        (
            {"head": True, "embed": False},
            "as a tree of booleans it has no entry for 'layers/0/kernel', 'layers/1/kernel'. "
            "Give each leaf, or a node above it, True or False.",
        ),
        (
            {"head": True, "embed": False, "layer": False, "layers": False},
            "wrt, a tree of booleans, has an entry for 'layer', which the tree lacks.",
        ),
        ([], "as a tree of booleans it has no entry for 'embed/bias'"),
        ("[z-a]", "wrt pattern '[z-a]' is not a valid glob: bad character range z-a at position"),
    ],
)
def test_errors_say_what_to_do(wrt, text):
    assert text in error_of(jg.select, TREE, wrt)
    assert text in error_of(jg.partition, TREE, wrt)


def test_an_empty_tree_says_so():
    assert "The tree's paths: none, it has no leaves." in error_of(jg.select, {}, "**")


def test_a_traced_answer_is_refused():
    decide = jax.jit(lambda t: jg.select(t, lambda path, leaf: leaf.sum() > 0))
    with pytest.raises(jg.SelectionError, match="which are known under jit; the values"):
        decide({"a": jnp.ones(2)})


def test_tied_nnx_parameters_are_refused_with_both_paths():
    net = nnx_net()
    net.layers[0].kernel = net.head.kernel
    text = error_of(jg.partition, net, "head/**")
    assert text.startswith("'head/kernel' and 'layers/0/kernel' are one tied Param.")
    assert "jaxgrad.functional(model)" in text
    assert "head/kernel" in jg.paths(net)  # to look is allowed
    tx = jg.param_groups({"head/**": optax.sgd(0.1)})
    for call in (tx.init, tx.assign, lambda net: jg.apply_updates(net, net)):
        assert error_of(call, net) == text


@pytest.mark.parametrize(
    ("halves", "text"),
    [
        (
            [{"a": 1.0, "b": 2.0}, {"a": None, "b": 3.0}],
            "1 leaf is in more than one tree: 'b' (in trees 0 and 1). Halves that were split",
        ),
        (
            [{"a": 1.0, "b": None}, {"a": None, "b": None}],
            "1 leaf is in none of the 2 trees: 'b'. Pass every half;",
        ),
        (
            [{"a": 1.0, "b": None}, {"a": None, "c": 1.0}],
            "tree 0 has 1 leaf that tree 1 lacks: 'b'. Both must have the same structure",
        ),
        (
            [{"a": [1.0]}, {"a": (None,)}],
            "tree 0 and tree 1 have the same paths but different containers: ",
        ),
    ],
)
def test_merge_errors_name_the_paths(halves, text):
    assert text in error_of(jg.merge, *halves, error=jg.MergeError)


def test_merge_of_nothing():
    with pytest.raises(TypeError, match="at least one tree"):
        jg.merge()


def test_half_of_another_split_is_found_out():
    head, _ = jg.partition(TREE, "head/**")
    _, rest = jg.partition(TREE, ["head/kernel", "embed/**"])
    text = error_of(jg.merge, head, rest, error=jg.MergeError)
    assert text.startswith("1 leaf is in more than one tree: 'head/bias' (in trees 0 and 1).")
    assert re.search(r"'embed/", error_of(jg.merge, rest, error=jg.MergeError))
