import pytest

import jaxgrad.torch as jgt
from jaxgrad.torch import Module
from jaxgrad.torch._reading import module as _module

FILES = ("module_zip.pt", "module_legacy.pt", "protocol_5_module.pt")


@pytest.fixture(params=FILES)
def net(request, goldens) -> Module:
    module = jgt.read(goldens / request.param).module
    assert module is not None
    return module


def test_children_in_order_with_their_classes(net):
    classes = {name: child.cls for name, child in net.children.items()}
    assert net.cls == "__main__.Net"
    assert list(classes.items()) == [
        ("stem", "torch.nn.modules.conv.Conv2d"),
        ("blocks", "torch.nn.modules.container.ModuleList"),
        ("norm", "torch.nn.modules.normalization.LayerNorm"),
        ("embed", "torch.nn.modules.sparse.Embedding"),
        ("head", "torch.nn.modules.linear.Linear"),
        ("again", "torch.nn.modules.conv.Conv2d"),
        ("mix", "torch.nn.modules.rnn.LSTM"),
        ("attend", "torch.nn.modules.activation.MultiheadAttention"),
        ("encoder", "torch.nn.modules.transformer.TransformerEncoderLayer"),
        ("scales", "torch.nn.modules.container.ParameterList"),
        ("drop", "torch.nn.modules.dropout.Dropout"),
    ]
    # A child that is None (`downsample`) is none.
    assert list(net.children["blocks"].children["1"].children) == ["conv", "norm", "act"]


def test_configurations(net):
    stem, block = net.children["stem"], net.children["blocks"].children["0"]
    assert stem.config["in_channels"] == 1
    assert stem.config["stride"] == (2, 2)
    assert block.children["conv"].config["groups"] == 2
    assert block.children["norm"].config["eps"] == 1e-3
    assert net.children["drop"].config == {"training": True, "p": 0.25, "inplace": False}
    assert net.children["mix"].config["bidirectional"] is True
    assert net.children["encoder"].config["activation"] == "torch.nn.functional.relu"
    # Private attributes and tensors are no configuration; lists are tuples.
    assert net.config == {
        "training": True,
        "widths": (4, 4),
        "transform": net.config["transform"],
    }
    assert net.config["transform"].endswith(".gelu")


def test_own_parameters_and_buffers(net):
    assert (net.parameters, net.buffers) == ((), ("mean",))  # `mask` is not persistent
    assert net.children["norm"].parameters == ()
    assert net.children["head"].parameters == ("weight",)
    assert net.children["scales"].parameters == ("0", "1")
    norm = net.children["blocks"].children["0"].children["norm"]
    assert norm.parameters == ("weight", "bias")
    assert norm.buffers == ("running_mean", "running_var", "num_batches_tracked")


def test_shared_modules_have_all_their_names_and_are_tied(goldens):
    for name in (*FILES, "state_dict.pt"):
        checkpoint = jgt.read(goldens / name)
        assert checkpoint.tied == (
            ("stem.weight", "again.weight"),
            ("stem.bias", "again.bias"),
            ("embed.weight", "head.weight"),
        )
    assert jgt.read(goldens / "state_dict.pt").module is None


def test_printed_as_pytorch_prints(goldens):
    module = jgt.read(goldens / "sequential_zip.pt").module
    assert repr(module) == (
        "Sequential(\n"
        "  (0): Linear(in_features=2, out_features=1)\n"
        "  (1): Dropout(p=0.5, inplace=False)\n"
        ")"
    )


def module(body, children: bytes = b"}", parameters: bytes = b"}", more: bytes = b"") -> bytes:
    """A pickled `a.Net`; memo entry 0 is the module itself."""
    state = body.text("_parameters") + parameters + body.text("_buffers") + b"}"
    state += body.text("_modules") + children + more
    return b"ca\nNet\n)\x81q\0}(" + state + b"ub"


def test_modules_inside_a_training_checkpoint(write_zip, body):
    made = b"}(" + body.text("net") + module(body) + body.text("step") + body.integer(2) + b"u"
    checkpoint = jgt.read(write_zip(made))
    assert checkpoint.module is None
    assert checkpoint.modules == {"net": Module("a.Net")}
    assert checkpoint.sub("net").module == Module("a.Net")


@pytest.mark.parametrize(
    ("children", "parameters", "entry", "reason"),
    [
        (b"}X\1\0\0\0ch\0s", b"}", "c.c.c", "nested deeper than 128 levels, or inside itself"),
        (b"}X\1\0\0\0cK\1s", b"}", "c", "is a int, not a module of plain state"),
        (b"}X\1\0\0\0ccm\nC\n)Rs", b"}", "c", "is a m.C, not a module of plain state"),
        (b"}", b"}X\1\0\0\0wK\1s", "w", "is a int, not a tensor with values"),
        (
            b"}",
            b"}X\1\0\0\0wctorch.nn.parameter\nUninitializedParameter\n)Rs",
            "w",
            "is a torch.nn.parameter.UninitializedParameter, not a tensor with values",
        ),
    ],
)
def test_modules_that_are_not_plain(write_zip, body, children, parameters, entry, reason):
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(write_zip(module(body, children, parameters)))
    assert caught.value.entry.startswith(entry)
    assert caught.value.reason == reason


def test_a_parent_held_as_an_attribute_is_no_cycle(write_zip, body):
    made = module(body, more=body.text("parent") + b"h\0" + body.text("width") + b"K\3")
    found = jgt.read(write_zip(made)).module
    assert found == Module("a.Net", {"width": 3})


def test_exponentially_many_shared_modules(write_zip, body):
    # Each module holds the one before under two names.
    made = module(body).replace(b"q\0", b"")
    for _ in range(40):
        children = b"}(" + body.text("a") + b"h\0" + body.text("b") + b"h\0u"
        made += b"q\0" + module(body, children).replace(b"q\0", b"")
    made = b"(" + made + b"l"
    with pytest.raises(jgt.TorchFileError, match="too many names"):
        jgt.read(write_zip(made))


def test_long_names_of_a_shared_module_cost_their_length(monkeypatch, write_zip, body):
    monkeypatch.setattr(_module, "MAX_NAMES_COST", 1_000_000)
    weight = body.tensor(body.storage("0", 1), 0, (1,), (1,)).replace(b"q\0", b"")
    shared = module(body, parameters=b"}" + body.text("k" * 100_000) + weight + b"s")
    # The same module twenty times: 20 bytes in the file, 2 MB of names.
    made = b"](" + shared + b"h\0" * 20 + b"e"
    with pytest.raises(jgt.TorchFileError, match="too many names"):
        jgt.read(write_zip(made, {"0": b"1234"}))
