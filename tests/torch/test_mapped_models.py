"""Whole models and single layers, mapped from files that PyTorch wrote: outputs are PyTorch's."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgrad as jg
import jaxgrad.torch as jt

GOLDENS = Path(__file__).parent.parent / "goldens" / "torch_models"
TOLERANCE = 1e-5


def golden(name):
    """The file's path, the input and the output, with channels last where there are images."""
    with np.load(GOLDENS / f"{name}.npz") as recorded:
        return GOLDENS / f"{name}.pt", *(channels_last(recorded[key]) for key in ("x", "y"))


def channels_last(x):
    return jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim > 3 else x)


def abstract(model):
    """The model without its initial values: nothing is computed, and all must be filled."""
    return nnx.eval_shape(lambda: model(nnx.Rngs(0)))


def made(name, layers):
    """A layer; abstract if it can be, which an `nnx.RNN` with its random stream can't."""
    concrete = name in ("lstm", "bilstm", "gru", "rnn")
    return layers[name](nnx.Rngs(0)) if concrete else abstract(layers[name])


def assert_equal(model, source, x, y, **kwargs):
    compared = jt.verify(model, source, x, y, atol=TOLERANCE, rtol=0.0, **kwargs)
    assert compared.scale > 0.1  # the recorded outputs are no zeros


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(*s, rngs=rngs) for s in ((49, 16), (16, 16), (16, 10))])

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (16, 16):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(10)(x)


class LeNet(nnx.Module):
    def __init__(self, rngs, channels_first=False):
        self.conv1 = nnx.Conv(1, 4, (5, 5), rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), padding="VALID", rngs=rngs)
        self.bn2 = nnx.BatchNorm(6, rngs=rngs)
        self.fc1 = nnx.Linear(36, 12, rngs=rngs)
        self.fc2 = nnx.Linear(12, 10, rngs=rngs)
        self.channels_first = channels_first

    def __call__(self, x):
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = nnx.max_pool(nnx.relu(bn(conv(x))), (2, 2), (2, 2))
        if self.channels_first:
            x = jnp.moveaxis(x, -1, 1)
        return self.fc2(nnx.relu(self.fc1(x.reshape(x.shape[0], -1))))


class LinenLeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features, size, padding in ((4, 5, "SAME"), (6, 3, "VALID")):
            x = nn.Conv(features, (size, size), padding=padding)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(12)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Block(nnx.Module):
    def __init__(self, inputs, outputs, stride, rngs):
        def conv(i, size, stride):
            pads = [(size // 2, size // 2)] * 2
            return nnx.Conv(
                i, outputs, (size,) * 2, stride, padding=pads, use_bias=False, rngs=rngs
            )

        self.conv1, self.bn1 = conv(inputs, 3, stride), nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2, self.bn2 = conv(outputs, 3, 1), nnx.BatchNorm(outputs, rngs=rngs)
        self.shortcut = nnx.List([])
        if stride != 1 or inputs != outputs:
            self.shortcut = nnx.List([conv(inputs, 1, stride), nnx.BatchNorm(outputs, rngs=rngs)])

    def __call__(self, x):
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        for layer in self.shortcut:
            x = layer(x)
        return nnx.relu(y + x)


class ResNet18(nnx.Module):
    def __init__(self, rngs, width=4):
        pads = [(3, 3), (3, 3)]
        self.stem = nnx.Conv(3, width, (7, 7), 2, padding=pads, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        sizes = [(1, 1, 1), (1, 2, 2), (2, 4, 2), (4, 4, 2)]
        self.stages = nnx.List(
            nnx.List([Block(i * width, o * width, s, rngs), Block(o * width, o * width, 1, rngs)])
            for i, o, s in sizes
        )
        self.head = nnx.Linear(4 * width, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=[(1, 1), (1, 1)])
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((1, 2)))


class EncoderLayer(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.ln1, self.ln2 = (nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.up, self.down = nnx.Linear(16, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        x = self.ln1(x + self.attention(x))
        return self.ln2(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([EncoderLayer(rngs), EncoderLayer(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class SequenceClassifier(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        cells = (nnx.OptimizedLSTMCell(6, 8, rngs=rngs), nnx.LSTMCell(8, 8, rngs=rngs))
        self.rnns = nnx.List([nnx.RNN(cell) for cell in cells])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        for rnn in self.rnns:
            x = rnn(x)
        return self.head(x[:, -1])


def test_mlp():
    model = MLP(nnx.Rngs(0))
    before = nnx.state(model)
    assert_equal(model, *golden("mlp"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_mlp_linen():
    path, x, y = golden("mlp")
    model = LinenMLP()
    assert_equal(jax.eval_shape(model.init, jax.random.key(0), x), path, x, y, apply=model.apply)


def test_mlp_nnx_state():
    path, x, y = golden("mlp")
    graphdef, state = nnx.split(MLP(nnx.Rngs(0)))
    filled = jt.load_into(state, path)
    assert type(filled) is type(state)
    assert_equal(nnx.merge(graphdef, filled), None, x, y)


def test_mlp_abstract():
    assert_equal(abstract(MLP), *golden("mlp"))


@pytest.mark.parametrize("flatten", [6, False])
def test_lenet(flatten):
    path, x, y = golden("lenet")
    model = abstract(functools.partial(LeNet, channels_first=flatten is False))
    assert_equal(model, path, x, y, rules=[jt.Rule("fc1", flatten=flatten)])


def test_lenet_linen():
    path, x, y = golden("lenet")
    model = LinenLeNet()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert_equal(variables, path, x, y, apply=model.apply, rules=[jt.Rule("fc1", flatten=6)])


RESNET_RULES = [
    *((f"layer{i}.*.downsample", f"stages/{i - 1}/*/shortcut") for i in (2, 3, 4)),
    *((f"layer{i}", f"stages/{i - 1}") for i in (1, 2, 3, 4)),
]


def assert_resnet_equal(source, x, y):
    model = jt.load_into(abstract(ResNet18), source, rules=RESNET_RULES)
    model.eval()
    assert_equal(model, None, x, y, apply=jax.jit(lambda model, x: model(x)))


def test_resnet18():
    """Rules say what only the author knows; stem, its norm and head are the only ones that fit."""
    assert_resnet_equal(*golden("resnet18"))


def test_encoder():
    assert_equal(abstract(Encoder), *golden("encoder"))


def test_lstm():
    assert_equal(SequenceClassifier(nnx.Rngs(0)), *golden("lstm"))


@pytest.mark.parametrize("name", ["mlp", "sequential"])
def test_from_module(name):
    path, x, y = golden(name)
    assert_equal(jt.from_module(path), None, x, y)


def test_from_module_lands_where_the_names_say():
    model = jt.from_module(GOLDENS / "sequential.pt")
    tensors = jt.read(GOLDENS / "sequential.pt").tensors
    kernel = tensors["1.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(getattr(getattr(model, "1"), "0").kernel[...], kernel)


# Single layers.


def _gru(rngs):
    cell = nnx.GRUCell(8, 8, rngs=rngs)
    cell.dense_h = nnx.Linear(8, 24, rngs=rngs)  # with the bias that PyTorch's has
    return nnx.RNN(cell)


def _transposed(size, strides=None):
    def make(rngs, transpose_kernel):
        return nnx.ConvTranspose(
            *(4, 4, size, strides), padding="VALID", transpose_kernel=transpose_kernel, rngs=rngs
        )

    return make


LAYERS = {
    "linear": lambda r: nnx.Linear(8, 8, rngs=r),
    "conv1d": lambda r: nnx.Conv(4, 4, 3, padding=2, kernel_dilation=2, rngs=r),
    "conv2d": lambda r: nnx.Conv(4, 4, (3, 2), (2, 1), padding="VALID", rngs=r),
    "conv3d": lambda r: nnx.Conv(4, 4, (2, 3, 1), padding="VALID", rngs=r),
    "grouped": lambda r: nnx.Conv(4, 8, (3, 3), padding="VALID", feature_group_count=4, rngs=r),
    "transposed1d": lambda r: _transposed(4, 3)(r, False),
    "transposed2d": lambda r: _transposed((3, 2), (2, 2))(r, False),
    "transposed3d": lambda r: _transposed((2, 3, 1))(r, False),
    "batchnorm": lambda r: nnx.BatchNorm(4, rngs=r),
    "layernorm": lambda r: nnx.LayerNorm(8, epsilon=1e-5, rngs=r),
    "groupnorm": lambda r: nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=r),
    "embedding": lambda r: nnx.Embed(7, 7, rngs=r),
    "lstm": lambda r: nnx.RNN(nnx.LSTMCell(8, 8, rngs=r)),
    "bilstm": lambda r: nnx.Bidirectional(
        *(nnx.RNN(nnx.OptimizedLSTMCell(8, 4, rngs=r)) for _ in range(2))
    ),
    "gru": _gru,
    "rnn": lambda r: nnx.RNN(nnx.SimpleCell(8, 8, rngs=r)),
    "attention": lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r),
}
WITH_TRANSPOSE_KERNEL = {
    "transposed1d": lambda r: _transposed(4, 3)(r, True),
    "transposed2d": lambda r: _transposed((3, 2), (2, 2))(r, True),
    "transposed3d": lambda r: _transposed((2, 3, 1))(r, True),
    "lstm": lambda r: nnx.RNN(nnx.OptimizedLSTMCell(8, 8, rngs=r)),
}


IMAGES = [
    name
    for name in LAYERS
    if name.startswith(("conv", "grouped", "transposed", "batchnorm", "groupnorm"))
]


def one_layer(name):
    everything = jt.read(GOLDENS / "layers.pt").tensors
    tensors = {
        k.removeprefix(f"{name}."): x for k, x in everything.items() if k.startswith(f"{name}.")
    }
    with np.load(GOLDENS / "layers.npz") as recorded:
        x, y = recorded[f"{name}.x"], recorded[f"{name}.y"]
    if name in IMAGES:
        x, y = (np.moveaxis(z, 1, -1) for z in (x, y))
    return tensors, jnp.asarray(x), jnp.asarray(y)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    tensors, x, y = one_layer(name)
    assert_equal(made(name, LAYERS), tensors, x, y)


@pytest.mark.parametrize("name", WITH_TRANSPOSE_KERNEL)
def test_layer_in_its_other_form(name):
    tensors, x, y = one_layer(name)
    assert_equal(made(name, WITH_TRANSPOSE_KERNEL), tensors, x, y)


@pytest.mark.parametrize("name", [*LAYERS])
def test_layer_back_to_pytorch(name):
    """What goes in comes out; two summed biases come back as their sum and zeros."""
    tensors, _, _ = one_layer(name)
    report = jt.match(made(name, LAYERS), tensors)
    model = report.apply()
    state = nnx.state(model, nnx.Not(nnx.RngState))
    assert [entry.path for entry in report.entries] == jg.paths(state)
    back = jt.to_torch(model, like=report)
    assert back.keys() == tensors.keys() - report.dropped.keys()
    for key, x in back.items():
        if name in ("lstm", "bilstm", "rnn") and "bias" in key:
            assert x.shape == tensors[key].shape
        else:
            np.testing.assert_array_equal(x, tensors[key], strict=True)
    again = jt.load_into(made(name, LAYERS), back)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again, nnx.Not(nnx.RngState)), state)


LINEN_CELLS = {
    "lstm": [nn.LSTMCell(8), nn.OptimizedLSTMCell(8)],
    "gru": [nn.GRUCell(8)],
    "rnn": [nn.SimpleCell(8)],
}


@pytest.mark.parametrize(
    ("name", "cell"), [(n, c) for n, cells in LINEN_CELLS.items() for c in cells]
)
def test_linen_cell(name, cell):
    tensors, x, y = one_layer(name)
    model = nn.RNN(cell)
    assert_equal(jax.eval_shape(model.init, jax.random.key(0), x), tensors, x, y, apply=model.apply)


def test_linen_attention():
    tensors, x, y = one_layer("attention")
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    assert_equal(jax.eval_shape(model.init, jax.random.key(0), x), tensors, x, y, apply=model.apply)


# The same with PyTorch at hand: other values, other sizes of input.


@pytest.fixture(scope="module")
def maker():
    torch = pytest.importorskip("torch")
    torch.manual_seed(7)
    spec = importlib.util.spec_from_file_location("maker", GOLDENS / "make_torch_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def live(maker, model, x):
    """A model's tensors, an input and PyTorch's output, as the goldens give them."""
    maker.unsettle(model)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return tensors, channels_last(x.numpy()), channels_last(maker.output(model, x))


@pytest.mark.torch
def test_lenet_live(maker):
    source, x, y = live(maker, maker.LeNet(), maker.torch.randn(2, 1, 12, 16))
    assert_equal(abstract(LeNet), source, x, y, rules=[jt.Rule("fc1", flatten=6)])


@pytest.mark.torch
def test_resnet18_live(maker):
    assert_resnet_equal(*live(maker, maker.ResNet18(), maker.torch.randn(2, 3, 64, 33)))


@pytest.mark.torch
def test_encoder_live(maker):
    layer = maker.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation="gelu")
    model = maker.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_equal(abstract(Encoder), *live(maker, model, maker.torch.randn(3, 9, 16)))


@pytest.mark.torch
def test_lstm_live(maker):
    x = maker.torch.randint(11, (2, 4))
    assert_equal(SequenceClassifier(nnx.Rngs(0)), *live(maker, maker.SequenceClassifier(), x))


@pytest.mark.torch
@pytest.mark.parametrize("name", LAYERS)
def test_layer_live(maker, name):
    layer, x = maker.layers()[name]
    tensors = {key: value.numpy() for key, value in maker.unsettle(layer).state_dict().items()}
    x, y = x.numpy(), maker.output(layer, x)
    if name in IMAGES:
        x, y = (np.moveaxis(z, 1, -1) for z in (x, y))
    assert_equal(made(name, LAYERS), tensors, jnp.asarray(x), jnp.asarray(y))


def test_nothing_needs_pytorch(tmp_path):
    """All of it in a process in which `import torch` fails."""
    code = f"""
import sys
sys.modules["torch"] = None
import jaxgrad.torch as jt
model = jt.from_module({str(GOLDENS / "mlp.pt")!r})
report = jt.match(model, {str(GOLDENS / "mlp.pt")!r})
jt.save_torch(report.apply(), {str(tmp_path / "mlp.pt")!r}, like=report)
assert not [name for name in sys.modules if name.startswith("torch.")]
print(*jt.read({str(tmp_path / "mlp.pt")!r}).tensors)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    names = [f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert ran.stdout.split() == names
