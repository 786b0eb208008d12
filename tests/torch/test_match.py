"""Which name goes where, what is refused, and what the refusals say."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg
import jaxgrad.torch as jt


def tensor(*shape, dtype=np.float32):
    """Values that differ from each other, so that no permutation goes unseen."""
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def dense(inputs, outputs):
    return {
        "kernel": np.zeros((inputs, outputs), np.float32),
        "bias": np.zeros(outputs, np.float32),
    }


def linear(name, outputs, inputs):
    return {f"{name}.weight": tensor(outputs, inputs), f"{name}.bias": tensor(outputs)}


def sources(report):
    return {entry.path: entry.sources for entry in report.entries}


def refused(params, source, **kwargs):
    with pytest.raises(jt.MappingError) as caught:
        jt.load_into(params, source, **kwargs)
    return str(caught.value)


# Matching.


def test_a_square_matrix_is_transposed_too():
    filled = jt.load_into({"fc": dense(3, 3)}, linear("fc", 3, 3))
    np.testing.assert_array_equal(filled["fc"]["kernel"], tensor(3, 3).T)


def test_the_argument_is_not_changed():
    params = {"fc": dense(3, 3)}
    jt.load_into(params, linear("fc", 3, 3))
    assert not params["fc"]["kernel"].any()


def test_names_under_another_prefix():
    report = jt.match(
        {"head": dense(3, 3), "stem": dense(3, 3)},
        linear("module.stem", 3, 3) | linear("module.head", 3, 3),
    )
    assert sources(report)["head/kernel"] == ("module.head.weight",)
    assert {entry.matched for entry in report.entries} == {"same name under another prefix"}


def test_the_only_one_that_fits():
    report = jt.match({"a": dense(3, 4), "b": dense(4, 3)}, linear("x", 3, 4) | linear("y", 4, 3))
    assert sources(report)["a/kernel"] == ("y.weight",)
    assert sources(report)["b/kernel"] == ("x.weight",)


def test_numbers_count_alike():
    params = {f"Dense_{i}": dense(3, 3) for i in range(11)}
    tensors = {k: v for i in range(11) for k, v in linear(f"layers.{3 * i}", 3, 3).items()}
    report = jt.match(params, tensors)
    assert sources(report)["Dense_10/kernel"] == ("layers.30.weight",)
    assert sources(report)["Dense_2/kernel"] == ("layers.6.weight",)


def test_numbers_that_nest_otherwise_decide_nothing():
    params = {f"stages_{i}": {f"block_{j}": dense(3, 3) for j in range(2)} for i in range(3)}
    tensors = {
        k: v for i in range(2) for j in range(3) for k, v in linear(f"layer{i}.{j}", 3, 3).items()
    }
    message = refused(params, tensors)
    assert "12 problems" not in message and "missing:" in message and "left over:" in message


def test_alike_layers_without_numbers_are_not_guessed():
    message = refused(
        {"up": dense(3, 3), "down": dense(3, 3)}, linear("a", 3, 3) | linear("b", 3, 3)
    )
    assert "8 problems" in message


def test_words_decide_among_alike_families():
    params = {f"blocks_{i}": {"query": dense(3, 3), "value": dense(3, 3)} for i in range(2)}
    tensors = {
        k: v
        for i in range(2)
        for word in ("value", "query")
        for k, v in linear(f"layer.{i}.attention.{word}", 3, 3).items()
    }
    report = jt.match(params, tensors)
    assert sources(report)["blocks_1/query/kernel"] == ("layer.1.attention.query.weight",)
    assert sources(report)["blocks_0/value/kernel"] == ("layer.0.attention.value.weight",)


def test_bookkeeping_is_dropped_and_listed():
    bn = {"scale": np.ones(2, np.float32), "bias": np.ones(2, np.float32)}
    stats = {"mean": np.ones(2, np.float32), "var": np.ones(2, np.float32)}
    source = {f"bn.{name}": tensor(2) for name in ("weight", "bias", "running_mean", "running_var")}
    source["bn.num_batches_tracked"] = np.array(7)
    report = jt.match({"params": {"bn": bn}, "batch_stats": {"bn": stats}}, source)
    assert report.dropped == {"bn.num_batches_tracked": "bookkeeping, holds no parameter"}
    assert sources(report)["batch_stats/bn/var"] == ("bn.running_var",)
    assert "not used\n  bn.num_batches_tracked  bookkeeping" in repr(report)


@pytest.mark.torch
def test_tied_tensors_fill_the_one_leaf(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(4, 3), "out": torch.nn.Linear(3, 4, False)}
    )
    model["out"].weight = model["embed"].weight
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    params = {"embed": {"embedding": np.zeros((4, 3), np.float32)}}
    report = jt.match(params, tmp_path / "tied.pt")
    assert report.dropped == {"out.weight": "tied to embed.weight"}
    assert list(jt.to_torch(report.apply(), like=report)) == ["embed.weight", "out.weight"]


def test_a_tensor_tied_to_one_that_is_not_loaded():
    tensors = dict.fromkeys(("embed.weight", "out.weight"), tensor(4, 3)) | linear("fc", 3, 3)
    source = jt.Checkpoint(
        pathlib.Path("net.pt"), "zip", tensors, (("embed.weight", "out.weight"),)
    )
    params = {"embed": {"embedding": np.zeros((4, 3), np.float32)}, "fc": dense(3, 3)}
    report = jt.match(params, source, wrt="fc/**")
    assert report.dropped == {"embed.weight": "not selected", "out.weight": "tied to embed.weight"}
    back = jt.to_torch(report.apply(), like=report)
    assert back["out.weight"] is back["embed.weight"] and not back["out.weight"].any()


def test_kinds_of_leaves_stay():
    params = {"a": {"kernel": np.zeros((2, 3), np.float32)}, "b": {"kernel": jnp.zeros((3, 2))}}
    filled = jt.load_into(params, {"a.weight": tensor(3, 2), "b.weight": tensor(2, 3)})
    assert type(filled["a"]["kernel"]) is np.ndarray
    assert isinstance(filled["b"]["kernel"], jax.Array)


def test_a_module_is_cloned():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    kernel = np.asarray(model.kernel[...])
    filled = jt.load_into(model, {"weight": tensor(3, 2), "bias": tensor(3)})
    assert type(filled) is nnx.Linear and filled is not model
    np.testing.assert_array_equal(model.kernel[...], kernel)
    np.testing.assert_array_equal(filled.kernel[...], tensor(3, 2).T)


def test_shardings_stay():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"fc": {"kernel": jax.device_put(jnp.zeros((2, 3)), sharding)}}
    assert jt.load_into(params, {"fc.weight": tensor(3, 2)})["fc"]["kernel"].sharding == sharding


# Rules.


def test_rules_rename_modules_and_tensors_in_order():
    params = {"trunk": {"0": dense(2, 2), "1": dense(2, 2)}, "out": dense(2, 2)}
    source = linear("net.a0", 2, 2) | linear("net.a1", 2, 2) | linear("net.a9", 2, 2)
    rules = [("net.a9.weight", "out/kernel"), ("net.a9", "out"), ("net.a*", "trunk/*")]
    report = jt.match(params, source, rules=rules)
    assert sources(report)["out/kernel"] == ("net.a9.weight",)
    assert sources(report)["trunk/1/bias"] == ("net.a1.bias",)
    assert {entry.matched for entry in report.entries} == {
        "net.a9.weight -> out/kernel",
        "net.a* -> trunk/*",
    }


@pytest.mark.parametrize(
    ("pattern", "path", "name", "expected"),
    [
        ("a.*.b", "x/*/y", "a.1.b.weight", "x/1/y/weight"),
        ("a.*.b", "x/*/y", "a.1.2.b.weight", None),
        ("**.b", "**/c", "a.1.b.weight", "a/1/c/weight"),
        ("**.b", "**/c", "b.weight", "c/weight"),
        ("a.**", "**", "a.b.weight", "b/weight"),
        ("a*.*", "*_*", "a1.2.weight", "1_2/weight"),
        ("a", "b", "ab.weight", None),
        ("**.b", "x.**", "a.1.b.weight", "x/a/1/weight"),
        ("a?", "b", "a1.weight", "b/weight"),
        ("a[0-2]*", "b*", "a23.weight", "b3/weight"),
        ("a[!0-2]", "b", "a1.weight", None),
        ("a[0]", "b", "a[0].weight", "b/weight"),
        ("a**.b", "*", "a1.2.b.weight", None),
    ],
)
def test_patterns(pattern, path, name, expected):
    assert jt.Rule(pattern, path).renamed([name]).get(name) == expected


@pytest.mark.parametrize(
    "pattern", ["a.*", "**.b", "a.**", "a", "a?", "a[12].b", "**", "a.**.b", "c"]
)
def test_patterns_are_those_of_wrt(pattern):
    names = ["a.b", "a.1.b.c", "a1.b", "a3.b", "a[12].b", "b.a", "c"]
    params = {name.replace(".", "/"): np.zeros(1) for name in names}
    expected = jg.paths(jg.partition(params, pattern.replace(".", "/"))[0])
    taken = jt.Rule(pattern, drop=True).renamed(names)
    assert sorted(taken.values()) == sorted(expected)


def test_a_pattern_that_is_a_name_means_that_name():
    taken = jt.Rule("w[0]", "v").renamed(["w[0]", "w0", "w[0].bias"])
    assert taken == {"w[0]": "v", "w[0].bias": "v/bias"}


def test_a_rule_that_matches_nothing():
    message = refused({"fc": dense(2, 2)}, linear("fc", 2, 2), rules=[("fd.weight", "fc")])
    assert message == (
        "the rule 'fd.weight -> fc' matches no name in the file; nearest: 'fc.weight'"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("a",), {}, "Rule('a') does nothing: give it a path, drop, layer or flatten"),
        (("a", "b"), {"drop": True}, "Rule('a') drops and renames to 'b': choose one"),
        (("a",), {"layer": "dense"}, "Rule('a'): layer='dense' is not one of linear, conv"),
        (("a",), {"flatten": True}, "Rule('a'): flatten=True must be the number of channels"),
        (("a", "*"), {}, "Rule('a'): the replacement '*' has more stars than the pattern"),
        (("**", "*_*"), {}, "Rule('**'): the replacement '*_*' has more stars than the pattern"),
        (("[z-a]", "b"), {}, "Rule('[z-a]') is not a valid glob: bad character range z-a"),
    ],
)
def test_rules_that_make_no_sense(arguments, options, text):
    with pytest.raises(jt.MappingError) as caught:
        jt.Rule(*arguments, **options)
    assert text in str(caught.value)


def test_what_is_no_rule():
    message = refused({"fc": dense(2, 2)}, linear("fc", 2, 2), rules=[("fc", None)])
    assert message.startswith("a rule is a (pattern, replacement) pair of strings or a jaxgrad")


def test_two_names_for_one_leaf():
    message = refused(
        {"fc": dense(2, 2)}, linear("a", 2, 2) | linear("b", 2, 2), rules=[("*", "fc")]
    )
    assert "the tensors 'a.weight' and 'b.weight' both map to 'fc/weight'" in message


# A selection.


def test_leaves_that_are_not_selected_stay_and_are_listed():
    params = {"fc": dense(2, 2), "head": dense(2, 5)}
    report = jt.match(params, linear("fc", 2, 2), wrt="!head/**")
    assert report.kept == {"head/kernel": "not selected", "head/bias": "not selected"}
    filled = report.apply()
    assert filled["head"]["kernel"] is params["head"]["kernel"]
    assert "2 of 4 leaves filled" in repr(report)


@pytest.mark.parametrize("outputs", [5, 4])
def test_a_layer_that_is_not_selected_stays_though_the_file_has_it(outputs):
    params = {"fc": dense(4, 5), "head": dense(5, 5)}
    source = linear("fc", 5, 4) | linear("head", outputs, 5)
    report = jt.match(params, source, wrt="fc/**")
    assert report.kept.keys() == {"head/kernel", "head/bias"}
    assert report.dropped == dict.fromkeys(["head.weight", "head.bias"], "not selected")
    filled = report.apply()
    assert filled["head"]["bias"] is params["head"]["bias"]
    np.testing.assert_array_equal(filled["fc"]["bias"], tensor(5))


def test_a_layer_of_which_one_leaf_is_selected():
    params = {"fc": dense(2, 3)}
    report = jt.match(params, linear("fc", 3, 2), wrt="fc/bias")
    assert sources(report) == {"fc/bias": ("fc.bias",)}
    assert report.kept == {"fc/kernel": "not selected"}
    assert report.dropped == {"fc.weight": "not selected"}
    filled = report.apply()["fc"]
    assert filled["kernel"] is params["fc"]["kernel"]
    np.testing.assert_array_equal(filled["bias"], tensor(3))
    back = jt.to_torch(report.apply(), like=report)
    assert list(back) == ["fc.weight", "fc.bias"] and not back["fc.weight"].any()


def test_one_block_of_packed_attention():
    model = nnx.MultiHeadAttention(1, 2, use_bias=False, rngs=nnx.Rngs(0))
    source = {"in_proj_weight": tensor(6, 2), "out_proj.weight": tensor(2, 2)}
    report = jt.match(model, source, wrt="key/kernel")
    assert sources(report) == {"key/kernel": ("in_proj_weight",)}
    assert report.dropped == {"out_proj.weight": "not selected"}


def test_a_selected_leaf_must_be_in_the_file():
    params = {"fc": dense(2, 2), "head": dense(2, 3)}
    message = refused(params, linear("fc", 2, 2), wrt="head/bias")
    assert message.startswith("the mapping does not fit the parameters: 1 problem\nmissing:")
    assert "'head/bias' float32[3]: the file has no 'head.bias'" in message
    message = refused({"fc": dense(2, 2)}, {"fc.weight": tensor(2, 2)}, wrt=["fc/kernel", "fc/b*"])
    assert "'fc/bias' float32[2]: the file has no 'fc.bias'" in message


def test_a_tensor_of_no_leaf_is_left_over_whatever_is_selected():
    params = {"fc": dense(2, 2), "head": dense(3, 2)}
    message = refused(params, linear("fc", 2, 2) | linear("aux", 2, 3), wrt="!head")
    assert "left over:\n  'aux.weight' float32[2,3]" in message


def test_a_layer_that_is_not_selected_needs_no_declaration():
    """Its layer type and the epsilon of a norm don't matter to what is loaded."""
    params = {"fc": dense(2, 3), "table": np.zeros((3, 3), np.float32)}
    report = jt.match(params, linear("fc", 3, 2) | {"table": tensor(3, 3)}, wrt="fc")
    assert report.kept == {"table": "not selected"}
    with pytest.raises(jt.MappingError, match=r"Rule\('table', layer=\.\.\.\)"):
        jt.to_torch(report.apply(), like=report)
    norm = module_file("LayerNorm", {"eps": 1e-5}, weight=tensor(3), bias=tensor(3))
    model = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    assert not jt.match(model, norm, wrt=lambda path, leaf: False).entries


def test_a_selection_that_matches_nothing():
    with pytest.raises(ValueError, match=r"wrt pattern 'haed/\*\*' matches no leaf"):
        jt.load_into({"head": dense(2, 2)}, {}, wrt="haed/**")


# Errors.


def test_missing_and_left_over():
    message = refused(
        {"fc": dense(2, 2), "head": dense(2, 3)}, linear("fc", 2, 2) | linear("heads", 3, 3)
    )
    assert message.startswith("the mapping does not fit the parameters: 4 problems")
    assert (
        "  'head/bias' float32[3]: the file has no 'head.bias'; nearest: 'heads.bias' "
        "float32[3]" in message
    )
    assert (
        "  'head/kernel' float32[2,3]: the file has no 'head.weight'; nearest: 'heads.weight' "
        "float32[3,3]" in message
    )
    assert "left over:\n  'heads.weight' float32[3,3]: nearest unfilled: 'head/kernel'" in message
    assert 'rules=[("<PyTorch name>", "<Flax path>")]' in message
    assert 'wrt="!<Flax path>"' in message


def test_a_tensor_that_its_layer_has_no_leaf_for():
    params = {"fc": {"kernel": np.zeros((2, 2), np.float32)}}
    assert "'fc.bias' float32[2]: its layer 'fc' has no leaf for it" in refused(
        params, linear("fc", 2, 2)
    )


def test_statistics_without_their_collection():
    params = {"bn": {"scale": np.ones(2, np.float32), "bias": np.ones(2, np.float32)}}
    source = {f"bn.{name}": tensor(2) for name in ("weight", "bias", "running_mean", "running_var")}
    message = refused(params, source)
    assert "'bn.running_mean' float32[2]: its layer 'bn' has no leaf for it" in message
    assert "batch_stats" in message


def test_shape():
    message = refused({"fc": dense(2, 3)}, linear("fc", 3, 4))
    assert (
        "shape:\n  'fc.weight' float32[3,4] should be [3, 2] for 'fc/kernel' float32[2,3] "
        "((out, in) -> (in, out))" in message
    )


def test_dtype():
    source = {name: x.astype(np.float16) for name, x in linear("fc", 3, 2).items()}
    message = refused({"fc": dense(2, 3)}, source)
    assert "'fc.weight' float16[3,2] should be float32 for 'fc/kernel' float32[2,3]" in message
    assert "param_dtype" in message


def test_a_parameter_of_the_users_own():
    params, source = {"table": np.zeros((3, 3), np.float32)}, {"table": tensor(3, 3)}
    message = refused(params, source)
    assert "'table' [3, 3] and 'table' [3, 3]: the layer type is ambiguous" in message
    assert "declare it with Rule('table', layer=...)" in message
    same = jt.load_into(params, source, rules=[jt.Rule("table", layer="same")])
    np.testing.assert_array_equal(same["table"], tensor(3, 3))
    turned = jt.load_into(params, source, rules=[jt.Rule("table", layer="linear")])
    np.testing.assert_array_equal(turned["table"], tensor(3, 3).T)


def test_vectors_of_the_users_own_need_no_declaration():
    filled = jt.load_into({"gain": np.zeros(3, np.float32)}, {"gain": tensor(3)})
    np.testing.assert_array_equal(filled["gain"], tensor(3))


def conv_params(inputs, outputs):
    return {"up": {"kernel": np.zeros((3, 2, inputs, outputs), np.float32)}}


def test_a_convolution_or_a_transposed_one():
    """Without classes, only different channels tell; the same number of both does not."""
    source = {"up.weight": tensor(4, 4, 3, 2)}
    message = refused(conv_params(4, 4), source)
    assert "'up/kernel' [3, 2, 4, 4] and 'up.weight' [4, 4, 3, 2]" in message
    assert "Rule('up', layer=...)" in message and '"conv_transpose"' in message
    conv = jt.load_into(conv_params(4, 4), source, rules=[jt.Rule("up", layer="conv")])
    np.testing.assert_array_equal(conv["up"]["kernel"], source["up.weight"].transpose(2, 3, 1, 0))
    rule = jt.Rule("up", layer="conv_transpose")
    transposed = jt.load_into(conv_params(4, 4), source, rules=[rule])
    flipped = source["up.weight"][:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(transposed["up"]["kernel"], flipped)


def test_different_channels_refute_one_reading():
    conv = jt.load_into(conv_params(4, 5), {"up.weight": tensor(5, 4, 3, 2)})
    np.testing.assert_array_equal(conv["up"]["kernel"], tensor(5, 4, 3, 2).transpose(2, 3, 1, 0))
    transposed = jt.load_into(conv_params(4, 5), {"up.weight": tensor(4, 5, 3, 2)})
    flipped = tensor(4, 5, 3, 2)[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(transposed["up"]["kernel"], flipped)


def test_linens_own_names_tell_a_convolution():
    params = {"Conv_0": {"kernel": np.zeros((3, 2, 4, 4), np.float32)}}
    filled = jt.load_into(params, {"conv.weight": tensor(4, 4, 3, 2)})
    expected = tensor(4, 4, 3, 2).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(filled["Conv_0"]["kernel"], expected)
    params = {"ConvTranspose_0": params["Conv_0"]}
    assert "the layer type is ambiguous" in refused(params, {"up.weight": tensor(4, 4, 3, 2)})


@pytest.mark.torch
def test_a_module_file_tells_the_layer_type(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 2, 3)), tmp_path / "up.pt")
    message = refused(
        nnx.eval_shape(lambda: nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))), tmp_path / "up.pt"
    )
    assert "layer type:\n  '' is of type conv in Flax and conv_transpose in the file" in message


def test_gru_with_a_bias_that_flax_has_no_room_for():
    source = {"weight_ih": tensor(6, 3), "weight_hh": tensor(6, 2)}
    source |= {"bias_ih": tensor(6), "bias_hh": tensor(6)}
    cell = nnx.eval_shape(lambda: nnx.GRUCell(3, 2, rngs=nnx.Rngs(0)))
    message = refused(cell, source)
    assert "'bias_hh' has a bias inside the reset gate (its last third)" in message
    assert "cell.dense_h = nnx.Linear(hidden, 3 * hidden, rngs=rngs)" in message
    source["bias_hh"] = np.array([1, 2, 3, 4, 0, 0], np.float32)
    filled = jt.load_into(cell, source)
    np.testing.assert_array_equal(filled.dense_i.bias[...], tensor(6) + source["bias_hh"])


def module_file(cls, config, **tensors):
    module = jt.Module(f"torch.nn.modules.{cls}", config, {}, tuple(tensors))
    return jt.Checkpoint(pathlib.Path("net.pt"), "zip", tensors, module=module)


def test_settings_that_no_tensor_shows():
    """LayerNorm's epsilon is 1e-5 in PyTorch and 1e-6 in Flax."""
    source = module_file("LayerNorm", {"eps": 1e-5}, weight=tensor(3), bias=tensor(3))
    model = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    assert "setting:\n  '' has eps 1e-06 in Flax and 1e-05 in the file" in refused(model, source)
    jt.load_into(nnx.LayerNorm(3, epsilon=1e-5, rngs=nnx.Rngs(0)), source)
    jt.load_into(model, source.tensors)  # the file doesn't tell
    weights = {"in_proj_weight": tensor(12, 4), "out_proj.weight": tensor(4, 4)}
    source = module_file("activation.MultiheadAttention", {"num_heads": 2}, **weights)
    for heads in (1, 4):
        model = nnx.MultiHeadAttention(heads, 4, use_bias=False, rngs=nnx.Rngs(0))
        assert f"'' has num_heads {heads} in Flax and 2 in the file" in refused(model, source)


def test_a_linear_layer_that_holds_its_weight_as_flax_does():
    """GPT-2's; where its weight is square, only a declaration can tell."""
    params, source = {"fc": dense(3, 3)}, linear("fc", 3, 3)
    same = jt.load_into(params, source, rules=[jt.Rule("fc", layer="same")])
    np.testing.assert_array_equal(same["fc"]["kernel"], tensor(3, 3))


def test_what_is_no_source():
    message = refused({"fc": dense(2, 2)}, 3)
    assert message.startswith("the source is a int; pass a path, a jaxgrad.torch.Checkpoint")


def test_nothing_to_fill_and_nothing_to_fill_with():
    assert jt.load_into({}, {}) == {}


def test_many_problems_are_summed_up_and_found_quickly():
    params = {f"a{i}x": {"kernel": np.zeros((2, 3), np.float32)} for i in range(3000)}
    source = {f"b{i}y.weight": tensor(3, 2) for i in range(2999)}
    message = refused(params, source)
    assert message.startswith("the mapping does not fit the parameters: 5999 problems")
    assert "\n  and 2960 more\n" in message and len(message.splitlines()) < 100


def test_parameters_beside_a_layers_own():
    """Attention with normalised queries has a LayerNorm inside, whose leaves are a layer too."""
    model = nnx.eval_shape(
        lambda: nnx.MultiHeadAttention(1, 2, normalize_qk=True, rngs=nnx.Rngs(0))
    )
    source = {"in_proj_weight": tensor(6, 2), "in_proj_bias": tensor(6)}
    source |= {"out_proj.weight": tensor(2, 2), "out_proj.bias": tensor(2)}
    source |= {"query_ln.weight": tensor(2), "key_ln.weight": tensor(2)}
    report = jt.match(model, source)
    assert sources(report)["query_ln/scale"] == ("query_ln.weight",)
