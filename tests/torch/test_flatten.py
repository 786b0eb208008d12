"""The flatten behind convolutions: found, declared, permuted, and never passed over."""

import numpy as np
import pytest
from flax import nnx

import jaxgrad.torch as jt


def tensor(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def conv(name, outputs, inputs):
    return {f"{name}.weight": tensor(outputs, inputs, 3, 3)}


def linear(name, outputs, inputs):
    return {f"{name}.weight": tensor(outputs, inputs)}


def params(**layers):
    return {name: {"kernel": np.zeros(shape, np.float32)} for name, shape in layers.items()}


def suspects(tree, source):
    with pytest.raises(jt.MappingError) as caught:
        jt.load_into(tree, source)
    message = str(caught.value)
    assert message.count("problem") == 1 and "flatten:" in message
    return message


CONV = (3, 3, 1, 4)


def test_the_first_linear_layer_behind_a_convolution():
    source = conv("conv", 4, 1) | linear("fc1", 5, 24) | linear("fc2", 24, 5)
    message = suspects(params(conv=CONV, fc1=(24, 5), fc2=(5, 24)), source)
    assert (
        "'fc1' takes 24 = 4 x 6 features and may follow a flatten of 4 channels; declare it "
        "with Rule('fc1', flatten=4) if the Flax model flattens channels last, or Rule('fc1', "
        "flatten=False) if it flattens channels first or not at all" in message
    )


def test_permutation():
    """A linear layer over channels-last features equals the one over channels-first features."""
    source = conv("conv", 4, 1) | linear("fc", 5, 24)
    tree = params(conv=CONV, fc=(24, 5))
    kernel = jt.load_into(tree, source, rules=[jt.Rule("fc", flatten=4)])["fc"]["kernel"]
    features = tensor(2, 4, 2, 3)
    first, last = features.reshape(2, -1), features.transpose(0, 2, 3, 1).reshape(2, -1)
    np.testing.assert_allclose(last @ kernel, first @ source["fc.weight"].T)
    same = jt.load_into(tree, source, rules=[jt.Rule("fc", flatten=False)])["fc"]["kernel"]
    np.testing.assert_array_equal(same, source["fc.weight"].T)


def test_a_norm_behind_the_flatten_is_permuted_too():
    tree = params(conv=CONV, fc=(24, 5)) | {"norm": {"scale": np.zeros(24, np.float32)}}
    source = conv("conv", 4, 1) | {"norm.weight": tensor(24)} | linear("fc", 5, 24)
    with pytest.raises(jt.MappingError, match="'norm' takes 24"):
        jt.load_into(tree, source)
    rules = [jt.Rule("norm", flatten=4), jt.Rule("fc", flatten=4)]
    scale = jt.load_into(tree, source, rules=rules)["norm"]["scale"]
    np.testing.assert_array_equal(scale, tensor(4, 6).T.reshape(-1))


def test_one_pixel_or_one_channel_leaves_nothing_to_permute():
    jt.load_into(params(conv=CONV, fc=(4, 5)), conv("conv", 4, 1) | linear("fc", 5, 4))
    tree = params(conv=(3, 3, 2, 1), fc=(24, 5))
    jt.load_into(tree, conv("conv", 1, 2) | linear("fc", 5, 24))


def test_layers_between_linear_layers_are_no_suspects():
    """A transformer's second linear layer takes a multiple of the patches' channels."""
    tree = params(patches=CONV, up=(4, 16), down=(16, 4))
    jt.load_into(tree, conv("patches", 4, 1) | linear("up", 16, 4) | linear("down", 4, 16))


def test_a_sorted_file_hides_nothing():
    """Safetensors files are often sorted: VGG's classifier then comes before its features."""
    source = linear("classifier", 5, 24) | conv("features", 4, 1)
    message = suspects(params(classifier=(24, 5), features=CONV), source)
    assert "Rule('classifier', flatten=4)" in message


def test_in_an_order_that_is_nobodys_the_counts_decide():
    """Some other layer puts out 24 features, but two take them: one of the two is behind it."""
    shapes = {"a": (24, 6), "b": (6, 24), "c": (24, 5), "features": CONV}
    source = linear("a", 6, 24) | linear("b", 24, 6) | linear("c", 5, 24) | conv("features", 4, 1)
    message = suspects_of_all(params(**shapes), source)
    assert "'a' takes 24" in message and "'c' takes 24" in message


def suspects_of_all(tree, source):
    with pytest.raises(jt.MappingError) as caught:
        jt.load_into(tree, source)
    return str(caught.value)


def test_the_models_own_order_counts():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.features = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
            self.classifier = nnx.Linear(24, 24, use_bias=False, rngs=rngs)
            self.again = nnx.Linear(24, 24, use_bias=False, rngs=rngs)

    source = linear("again", 24, 24) | linear("classifier", 24, 24) | conv("features", 4, 1)
    message = suspects_of_all(Model(nnx.Rngs(0)), source)
    assert "'classifier' takes 24" in message and "'again' takes" not in message


def test_channels_that_do_not_divide():
    source = conv("conv", 4, 1) | linear("fc", 5, 24)
    with pytest.raises(jt.MappingError) as caught:
        jt.load_into(params(conv=CONV, fc=(24, 5)), source, rules=[jt.Rule("fc", flatten=5)])
    assert "'fc' takes 24 features, which is not a multiple of the 5 channels" in str(caught.value)


def test_a_model_with_pytorchs_flatten_needs_no_declaration():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
            self.flatten = jt.Flatten()
            self.fc = nnx.Linear(24, 5, use_bias=False, rngs=rngs)

    source = conv("conv", 4, 1) | linear("fc", 5, 24)
    filled = jt.load_into(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), source)
    np.testing.assert_array_equal(filled.fc.kernel[...], source["fc.weight"].T)


def test_writing_refuses_what_reading_refuses():
    tree = params(conv=CONV, fc=(24, 5))
    rules = [jt.Rule("conv", layer="conv")]
    with pytest.raises(jt.MappingError) as caught:
        jt.to_torch(tree, rules=rules)
    assert "Rule('fc', flatten=4)" in str(caught.value)
    tree["fc"]["kernel"] = tensor(24, 5)
    weight = jt.to_torch(tree, rules=[*rules, jt.Rule("fc", flatten=4)])["fc.weight"]
    back = jt.load_into(
        tree,
        {"fc.weight": weight, "conv.weight": tensor(4, 1, 3, 3)},
        rules=[jt.Rule("fc", flatten=4)],
    )
    np.testing.assert_array_equal(back["fc"]["kernel"], tensor(24, 5))


@pytest.mark.parametrize("in_file", [True, False])
def test_a_layer_that_is_not_loaded_is_declared_only_to_be_written(in_file):
    tree = params(conv=CONV, fc=(24, 5))
    source = conv("conv", 4, 1) | (linear("fc", 5, 24) if in_file else {})
    report = jt.match(tree, source, wrt="conv/**")
    assert report.kept == {"fc/kernel": "not selected"}
    with pytest.raises(jt.MappingError, match=r"Rule\('fc', flatten=4\)"):
        jt.to_torch(report.apply(), like=report)
    back = jt.to_torch(report.apply(), like=report, rules=[jt.Rule("fc", flatten=4)])
    assert list(back) == ["conv.weight", "fc.weight"]


def test_a_layer_that_is_not_loaded_still_tells_of_a_flatten():
    source = conv("conv", 4, 1) | linear("fc", 5, 24)
    with pytest.raises(jt.MappingError, match=r"Rule\('fc', flatten=4\)"):
        jt.load_into(params(conv=CONV, fc=(24, 5)), source, wrt="fc/**")
