"""Models from module files: each layer, the order of running, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad.torch as jt


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    return torch


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)


def unsettled(torch, model):
    for name, x in model.state_dict().items():
        if name.endswith("running_var"):
            x.uniform_(0.5, 2)
        elif x.is_floating_point() and x.ndim == 1:
            x.add_(torch.rand_like(x))
    return model.eval()


def assert_built(torch, model, x, tmp_path, **kwargs):
    unsettled(torch, model)
    with torch.no_grad():
        expected = model(x).numpy()
    torch.save(model, tmp_path / "model.pt")
    built = jt.from_module(tmp_path / "model.pt", **kwargs)
    x = channels_last(x.numpy())
    compared = jt.verify(built, None, x, channels_last(expected), rtol=0.0)
    assert compared.scale > 0.01
    out = jax.jit(lambda model, x: model(x))(built, x)  # what it holds may go through jit
    np.testing.assert_allclose(out, channels_last(expected), atol=1e-5)
    return built


IMAGE, LINE, VOLUME, ROWS = (2, 4, 8, 6), (2, 4, 9), (2, 4, 4, 5, 6), (3, 4)
LAYERS = [
    ("Linear(4, 4)", ROWS),
    ("Linear(4, 3, bias=False)", ROWS),
    ("Conv1d(4, 4, 3, dilation=2, padding=1)", LINE),
    ("Conv2d(4, 6, (3, 2), stride=2, groups=2, padding=(1, 0), bias=False)", IMAGE),
    ("Conv2d(4, 4, 4, padding='same')", IMAGE),
    ("Conv2d(4, 4, 3, padding='valid')", IMAGE),
    ("Conv3d(4, 3, 2)", VOLUME),
    ("ConvTranspose1d(4, 3, 4, 3, padding=1, output_padding=2)", LINE),
    ("ConvTranspose2d(4, 4, (3, 2), 2, dilation=2)", IMAGE),
    ("ConvTranspose3d(4, 3, 2, bias=False)", VOLUME),
    ("BatchNorm1d(4)", ROWS),
    ("BatchNorm1d(4)", LINE),
    ("BatchNorm2d(4, eps=0.1, affine=False)", IMAGE),
    ("BatchNorm3d(4)", VOLUME),
    ("LayerNorm(4, eps=0.1)", ROWS),
    ("LayerNorm(4, bias=False)", ROWS),
    ("LayerNorm(4, elementwise_affine=False)", ROWS),
    ("GroupNorm(2, 4)", IMAGE),
    ("GroupNorm(2, 4, affine=False)", ROWS),
    ("Flatten()", ROWS),
    ("MaxPool1d(2)", LINE),
    ("MaxPool2d(3, 2, padding=1)", IMAGE),
    ("MaxPool3d((1, 2, 3))", VOLUME),
    ("AvgPool1d(2)", LINE),
    ("AvgPool2d(3, 2, padding=1)", IMAGE),
    ("AvgPool2d((2, 3), padding=1, count_include_pad=False)", IMAGE),
    ("AvgPool3d(2)", VOLUME),
    ("AdaptiveAvgPool1d(1)", LINE),
    ("AdaptiveAvgPool2d((1, 1))", IMAGE),
    ("AdaptiveMaxPool3d(1)", VOLUME),
    ("Dropout(0.9)", ROWS),
    ("Softmax(dim=1)", ROWS),
    ("LogSoftmax(dim=-1)", ROWS),
    *((f"{name}()", ROWS) for name in ("Identity", "ReLU", "ReLU6", "SELU", "SiLU", "Mish")),
    *((f"{name}()", ROWS) for name in ("Tanh", "Sigmoid", "LogSigmoid", "Softsign", "Hardswish")),
    *((f"{name}()", ROWS) for name in ("Hardsigmoid", "GELU", "LeakyReLU", "ELU", "CELU")),
    *((f"{name}()", ROWS) for name in ("Hardtanh", "Softplus")),
    ("GELU(approximate='tanh')", ROWS),
    ("LeakyReLU(0.3)", ROWS),
    ("ELU(0.3)", ROWS),
    ("CELU(0.3)", ROWS),
    ("Hardtanh(-0.2, 0.3)", ROWS),
]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: str(value))
def test_layer(torch, layer, shape, tmp_path):
    model = eval(f"nn.{layer}", {"nn": torch.nn})
    assert_built(torch, torch.nn.Sequential(model), torch.randn(shape) * 2, tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3])
def test_softmax_over_images(torch, dim, tmp_path):
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Softmax(dim))
    assert_built(torch, model, torch.randn(IMAGE), tmp_path)


@pytest.mark.torch
def test_flatten_of_images_is_pytorchs(torch, tmp_path):
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten(), nn.BatchNorm1d(144), nn.Linear(144, 5))
    built = assert_built(torch, model, torch.randn(IMAGE), tmp_path)
    other = jt.load_into(built, jt.read(tmp_path / "model.pt").tensors)  # nothing to declare
    jt.verify(other, None, jnp.ones((2, 8, 6, 4)), built(jnp.ones((2, 8, 6, 4))))


@pytest.mark.torch
def test_embedding_then_flatten(torch, tmp_path):
    nn = torch.nn
    model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 2))
    assert_built(torch, model, torch.randint(7, (2, 3)), tmp_path)


@pytest.mark.torch
def test_half_precision(torch, tmp_path):
    nn = torch.nn
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16()
    torch.save(model, tmp_path / "model.pt")
    built = jt.from_module(tmp_path / "model.pt")
    assert getattr(built, "0").kernel.dtype == jnp.bfloat16
    assert getattr(built, "1").mean.dtype == jnp.float32


@pytest.mark.torch
def test_train_mode_drops_with_the_key_that_is_passed(torch, tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Dropout(0.5)), tmp_path / "model.pt")
    built = jt.from_module(tmp_path / "model.pt")
    x = jnp.ones((4, 8))
    np.testing.assert_array_equal(built(x), x)
    built.train()
    first, again = (built(x, rngs=nnx.Rngs(dropout=1)) for _ in range(2))
    assert set(np.unique(first)) == {0.0, 2.0}
    np.testing.assert_array_equal(first, again)


@pytest.mark.torch
def test_a_module_that_is_one_layer(torch, tmp_path):
    assert_built(torch, torch.nn.Linear(4, 4), torch.randn(ROWS), tmp_path)


# The order of running. Classes in the files: their names are in `__main__` or here, it is all one.


@pytest.fixture(scope="module")
def user(torch):
    """A user's class with the given layers; `run` is its forward, which no file holds."""

    class Net(torch.nn.Module):
        def __init__(self, run=None, **layers):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)
            type(self).run = staticmethod(run)

        def forward(self, x):
            return type(self).run(self, x)

    Net.__qualname__ = "Net"
    globals()["Net"] = Net
    return Net


def refused(torch, model, tmp_path, **kwargs):
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(jt.MappingError) as caught:
        jt.from_module(tmp_path / "model.pt", **kwargs)
    return str(caught.value)


@pytest.mark.torch
def test_a_users_class_with_an_obvious_order(torch, user, tmp_path):
    nn = torch.nn
    block = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    net = user(lambda s, x: s.head(s.block(x)), block=block, head=nn.Linear(6, 3))
    assert_built(torch, net, torch.randn(ROWS), tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("a=Linear(4, 4), b=Linear(4, 3), act=ReLU()", "nothing nonlinear is registered between"),
        ("act=ReLU(), a=Linear(4, 3)", "'act' is registered first"),
        ("a=Linear(4, 6), act=ReLU(), b=Linear(6, 4)", "returns as many features as it takes (4)"),
        ("a=Linear(4, 6), act=ReLU(), b=Linear(5, 3)", "takes 5 features, but the layer before"),
        ("act=ReLU()", "it has no linear or convolutional layer"),
        ("a=ModuleList([Linear(4, 3)])", "'a' (torch.nn.modules.container.ModuleList)"),
        (
            "a=Conv2d(1, 2, 3), r=ReLU(), pool=MaxPool2d(2), b=Conv2d(2, 3, 3), q=ReLU()",
            "'pool' may run more than once",
        ),
        ("a=Conv2d(1, 2, 3), r=ReLU(), b=Linear(2, 3)", "runs over features with spatial axes"),
        ("a=Linear(4, 3), gain=Parameter(tensor(1.0))", "it uses 'gain' by itself"),
    ],
)
def test_an_order_that_is_not_obvious(torch, user, layers, text, tmp_path):
    scope = {"dict": dict, **vars(torch.nn), "tensor": torch.tensor}
    message = refused(torch, user(**eval(f"dict({layers})", scope)), tmp_path)
    assert text in message


@pytest.mark.torch
def test_a_residual_block_is_no_chain(torch, user, tmp_path):
    """Its layers make a chain without a flaw, and its forward adds the input."""
    nn = torch.nn
    layers = {"conv1": nn.Conv2d(4, 4, 3), "bn1": nn.BatchNorm2d(4), "relu": nn.ReLU()}
    block = user(None, **layers, conv2=nn.Conv2d(4, 4, 3), bn2=nn.BatchNorm2d(4))
    message = refused(torch, nn.Sequential(nn.Conv2d(3, 4, 3), block), tmp_path)
    assert (
        message.startswith("the file doesn't show how '1' (")
        and "so it may add its input to its output" in message
    )
    assert 'forward=("fc1", jax.nn.relu, "fc2", ...)' in message


@pytest.mark.torch
def test_forward_says_how_the_layers_run(torch, user, tmp_path):
    nn, functional = torch.nn, torch.nn.functional

    def run(net, x):
        x = functional.max_pool2d(net.act(net.conv1(x)), 2)
        x = functional.max_pool2d(net.act(net.block[0](x)), 2)
        return net.fc2(net.act(net.fc1(x.flatten(1))))

    layers = {
        "conv1": nn.Conv2d(1, 4, 3),
        "block": nn.Sequential(nn.Conv2d(4, 4, 3)),
        "act": nn.ELU(),
    }
    net = user(run, **layers, fc1=nn.Linear(24, 5), fc2=nn.Linear(5, 3))

    def pool(x):
        return nnx.max_pool(x, (2, 2), (2, 2))

    forward = ["conv1", "act", pool, "block.0", "act", pool, jt.Flatten(), "fc1", "act", "fc2"]
    assert_built(torch, net, torch.randn(2, 1, 14, 18), tmp_path, forward=forward)
    assert "which the module does not have; nearest: 'conv1'" in refused(
        torch, net, tmp_path, forward=["conv", "fc1"]
    )
    assert "forward leaves out the layer of 'block.0.weight', 'block.0.bias'" in refused(
        torch, net, tmp_path, forward=["conv1", "act", jt.Flatten(), "fc1", "fc2"]
    )
    flat = [*forward[:6], lambda x: x.reshape(x.shape[0], -1), *forward[7:]]
    assert "Rule('fc1', flatten=4)" in refused(torch, net, tmp_path, forward=flat)
    rules = [jt.Rule("fc1", flatten=4)]
    assert_built(torch, net, torch.randn(2, 1, 14, 18), tmp_path, forward=flat, rules=rules)


# Layers that Flax has no equal for.


@pytest.mark.torch
@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ("LSTM(4, 4)", "'0' (LSTM): no translation to Flax"),
        ("Conv2d(4, 4, 3, padding=1, padding_mode='reflect')", "padding_mode='reflect'"),
        ("ConvTranspose2d(4, 4, 3, groups=2)", "groups=2 has no equivalent in Flax"),
        ("BatchNorm2d(4, track_running_stats=False)", "track_running_stats=False"),
        ("BatchNorm2d(4, momentum=None)", "momentum=None, a cumulative average"),
        ("LayerNorm((4, 4))", "normalises over (4, 4)"),
        ("Conv2d(3, 4, 1), LayerNorm(4)", "'1' (LayerNorm): normalises over (4,)"),
        ("MaxPool2d(2, ceil_mode=True)", "ceil_mode=True"),
        ("MaxPool2d(2, dilation=2)", "dilation=2"),
        ("AvgPool2d(2, divisor_override=3)", "divisor_override=3"),
        ("AdaptiveAvgPool2d(2)", "output_size=(2, 2) has no equivalent in Flax, only 1 has"),
        ("Flatten(0)", "start_dim=0"),
        ("BatchNorm1d(4), Flatten()", "it is unknown whether there are spatial axes to flatten"),
        ("Softmax()", "dim=None lets PyTorch choose"),
        ("Softplus(beta=2)", "beta=2"),
        ("Embedding(4, 4, max_norm=1.0)", "max_norm=1.0"),
        ("Linear(4, 4), Embedding(4, 4)", "takes the output of another layer"),
        (
            "Conv2d(3, 4, 1), Conv1d(4, 4, 1)",
            "takes 1 spatial axes, but the layer before returns 2",
        ),
        ("Linear(4, 5), Linear(4, 5)", "takes 4 features, but the layer before returns 5"),
    ],
)
def test_refusals(torch, layers, text, tmp_path):
    model = eval(f"Sequential({layers})", dict(vars(torch.nn)))
    assert text in refused(torch, model, tmp_path)


@pytest.mark.torch
def test_tied_layers(torch, tmp_path):
    shared = torch.nn.Linear(4, 4)
    message = refused(torch, torch.nn.Sequential(shared, torch.nn.ReLU(), shared), tmp_path)
    assert "'0.weight', '2.weight' are one tensor" in message


def test_a_source_without_a_module():
    with pytest.raises(jt.MappingError, match="the source holds tensors but no module"):
        jt.from_module({"weight": np.zeros((2, 2))})
