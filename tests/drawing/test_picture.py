import re
import sys
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

import jaxgrad as jg
from jaxgrad._drawing.layered import Box, layout, lines
from jaxgrad.models import MLP, ViT
from tests.losses import CASES


@pytest.fixture(autouse=True)
def linen_promotes():
    """Linen's pooling divides by a NumPy integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def classifier(model, image):
    apply, params = jg.functional(model)

    def loss(params, batch):
        logits = apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    batch = {
        "image": jax.ShapeDtypeStruct(image, jnp.float32),
        "label": jax.ShapeDtypeStruct(image[:1], jnp.int32),
    }
    return loss, params, batch


@pytest.fixture(scope="module")
def mlp():
    made = classifier(MLP(784, (32, 32), 10, rngs=nnx.Rngs(0)), (8, 28, 28))
    return jg.graph(*made, wrt="head/**")


@pytest.fixture(scope="module")
def vit():
    model = nnx.eval_shape(lambda: ViT(width=12, rngs=nnx.Rngs(0)))
    return classifier(model, (8, 28, 28, 1))


def labels(picture, state=None, kind=None):
    return [
        n.label
        for n in picture.diagram.nodes.values()
        if state in (None, n.state) and kind in (None, n.kind)
    ]


def arrows(picture):
    nodes = picture.diagram.nodes
    return [(nodes[e.source].label, nodes[e.target].label) for e in picture.diagram.edges]


def test_an_mlp_by_operations(mlp):
    assert labels(mlp, kind="op") == [
        *["reshape", *["dot_general", "add", "max"] * 2, "dot_general", "add"],
        *["reduce_sum", "div"],
    ]
    assert labels(mlp, kind="call") == ["softmax_cross_entropy_with_integer_labels"]
    assert labels(mlp, kind="input") == ["batch/image", "batch/label"]
    assert labels(mlp, "trained", "param") == ["kernel", "bias"]
    assert labels(mlp, "trained", "op") == ["dot_general", "add", "reduce_sum", "div"]
    assert len(labels(mlp, "frozen", "param")) == 4
    modules = [n.module for n in mlp.diagram.nodes.values() if n.kind == "param"]
    assert modules == [m for m in ("layers/0", "layers/1", "head") for _ in range(2)]
    relu = [n for n in mlp.diagram.nodes.values() if n.label == "max"]
    assert [n.module for n in relu] == ["", ""]  # of the MLP, not of a layer


def test_the_crossing_is_marked(mlp):
    (crossing,) = [e for e in mlp.diagram.edges if e.staged]
    nodes = mlp.diagram.nodes
    assert (nodes[crossing.source].label, nodes[crossing.target].label) == ("max", "dot_general")
    assert crossing.label == "8 × 32" and nodes[crossing.target].module == "head"
    assert "stored once: 8 × 32" in mlp.svg()


def test_shapes_are_on_the_arrows(mlp):
    shapes = [e.label for e in mlp.diagram.edges if e.source.startswith("n")]
    assert shapes == [
        *["8 × 784", *["8 × 32"] * 6, *["8 × 10"] * 2],
        *["8", "scalar", "scalar"],
    ]


def test_nothing_is_highlighted_without_wrt():
    picture = jg.graph(lambda p, x: (p["w"] * x).sum(), {"w": jnp.ones(3)}, jnp.ones(3))
    assert set(n.state for n in picture.diagram.nodes.values()) == {""}
    assert picture.notes == {"data": "data"}
    assert set(arrows(picture)) == {
        *{("x", "mul"), ("w", "mul")},
        *{("mul", "reduce_sum"), ("reduce_sum", "value")},
    }


def test_a_vit_by_modules(vit):
    picture = jg.graph(*vit, wrt=["layers/11/**", "norm/**", "head/**"])
    assert labels(picture, kind="module") == [
        *["patches", "layers/0 … layers/10", "layers/11", "norm", "head"]
    ]
    (many,) = [n for n in picture.diagram.nodes.values() if "…" in n.label]
    numbers = sum(x.size for x in jax.tree.leaves(vit[1]["layers"][0]))
    assert many.detail == f"× 11, each 16 arrays, {numbers / 1000:.3g}k weights"
    assert many.state == "frozen"
    assert labels(picture, "trained", "module") == ["layers/11", "norm", "head"]
    (crossing,) = [e for e in picture.diagram.edges if e.staged]
    assert crossing.source == many.key
    assert ("token", "concatenate · add") in arrows(picture)


def test_blocks_that_are_trained_alike_fold(vit):
    assert "layers/0 … layers/11" in labels(jg.graph(*vit, wrt="head/**"))
    assert "layers/0 … layers/11" in labels(jg.graph(*vit))
    half = jg.graph(*vit, wrt=[f"layers/{i}/**" for i in range(6, 12)])
    assert {"layers/0 … layers/5", "layers/6 … layers/11"} < set(labels(half))


def test_depth(vit):
    inner = labels(jg.graph(*vit, depth=2))
    assert {"layers/3/norm1", "layers/3/attention", "layers/3/up", "layers/3/down"} < set(inner)
    assert labels(jg.graph(*vit, depth=0)).count("dot_general") == 12 * 8 + 1
    with pytest.raises(ValueError, match="depth=-1 is negative; pass 0 to draw operations"):
        jg.graph(*vit, depth=-1)


def test_named_scopes_are_modules():
    def loss(p, x):
        with jax.named_scope("trunk"):
            h = jnp.tanh(jnp.tanh(x @ p["a"]))
        with jax.named_scope("top"):
            return (h @ p["b"]).sum()

    picture = jg.graph(loss, {"a": jnp.ones((9, 3)), "b": jnp.ones(3)}, jnp.ones((4, 9)), depth=1)
    assert labels(picture, kind="module") == ["trunk", "top"]


def test_a_parameter_that_is_read_twice_stands_at_both_readers():
    case = CASES["shared weight"]()
    picture = jg.graph(case.loss, case.params, case.data, wrt=case.wrt)
    shared = [n for n in picture.diagram.nodes.values() if n.detail.endswith(", shared")]
    assert [(n.module, n.label) for n in shared] == [("shared", "w")] * 2 + [("shared", "b")] * 2
    assert len({n.frame for n in shared}) == 2


def overlap(a: Box, b: Box):
    return abs(a.x - b.x) < (a.width + b.width) / 2 and abs(a.y - b.y) < (a.height + b.height) / 2


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * ("ViT" in n)) for n in CASES]
)
def test_every_loss_is_drawn_and_no_boxes_overlap(name):
    case = CASES[name]()
    for depth in (0, 1):
        picture = jg.graph(case.loss, case.params, case.data, wrt=case.wrt, depth=depth)
        placed = layout(picture.diagram)
        assert placed.boxes.keys() == picture.diagram.nodes.keys()
        boxes = list(placed.boxes.values())
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if overlap(a, b)]
        for edge, route in zip(picture.diagram.edges, placed.routes, strict=True):
            a, b = placed.boxes[edge.source], placed.boxes[edge.target]
            assert a.y < b.y or route.sideways
        root = ElementTree.fromstring(picture.svg())
        texts = {t.text for t in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {line for n in picture.diagram.nodes.values() for line in lines(n)} <= texts


@pytest.mark.parametrize(
    "name",
    [
        "MLP, head",
        pytest.param("ViT, head", marks=pytest.mark.slow),
        "Linen module",
        "Equinox module",
    ],
)
def test_the_crossing_is_that_of_stage(name):
    case = CASES[name]()
    picture = jg.graph(case.loss, case.params, case.data, wrt=case.wrt)
    report = jg.stage(case.loss, case.params, case.data, case.wrt).report()
    stored = [" × ".join(map(str, (10, *c.shape))) for c in report.crossing if c.computed]
    assert stored and {e.label for e in picture.diagram.edges if e.staged} == set(stored)


def test_without_a_batch_there_is_no_crossing():
    params = {"a": jnp.ones((50, 3)), "b": jnp.ones(3)}
    loss = lambda p, x: (jnp.tanh(x @ p["a"]) @ p["b"]).sum()
    assert any(e.staged for e in jg.graph(loss, params, jnp.ones((4, 50)), wrt="b").diagram.edges)
    one_row = jg.graph(loss, params, jnp.ones((1, 50)), wrt="b")
    assert not any(e.staged for e in one_row.diagram.edges)
    assert not jg.graph(lambda p: p["b"].sum(), params, wrt="b").notes.get("staged")


def test_files(mlp, tmp_path):
    for suffix in ("svg", "png", "dot", "mmd"):
        mlp.save(tmp_path / f"g.{suffix}")
    assert (tmp_path / "g.svg").read_text(encoding="utf-8") == mlp.svg() == mlp._repr_svg_()
    with Image.open(tmp_path / "g.png") as image:
        width, height = map(int, re.findall(r'(?:width|height)="(\d+)"', mlp.svg())[:2])
        assert abs(image.width - 2 * width) <= 2 and abs(image.height - 2 * height) <= 2
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert [255, 240, 221] in colours.tolist()  # what is trained
    dot, mermaid = (tmp_path / "g.dot").read_text(), (tmp_path / "g.mmd").read_text()
    n_edges = len(mlp.diagram.edges)
    assert dot.startswith("digraph {") and dot.count(" -> ") == n_edges
    assert mermaid.startswith("flowchart TD") and mermaid.count("-->") == n_edges - 1
    assert mermaid.count("-.->") == 1 and 'kernel<br>32 × 10"]:::trained' in mermaid
    with pytest.raises(ValueError, match=r"ends in '\.jpg'; a picture is saved as \.svg, \.png"):
        mlp.save(tmp_path / "g.jpg")


def test_labels_are_escaped():
    picture = jg.graph(lambda p: p['<"a">'].sum(), {'<"a">': jnp.ones(2)})
    ElementTree.fromstring(picture.svg())
    assert '[label="<\\"a\\">' in picture.dot() and "#quot;" in picture.mermaid()


def test_a_missing_extra_is_named(mlp, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs 'resvg_py': pip install 'jaxgrad\[graph"):
        mlp.png()


def test_repr_and_errors(mlp, vit):
    assert repr(mlp) == "<Picture of 21 nodes and 20 edges; .save('graph.svg') writes it>"
    with pytest.raises(jg.SelectionError, match="Did you mean 'head'"):
        jg.graph(*vit, wrt="haed/**")
