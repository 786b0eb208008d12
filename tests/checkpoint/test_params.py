import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxgrad as jg
from jaxgrad._checkpoint import arrays as _arrays
from jaxgrad._disk.digest import checksum
from jaxgrad._tree.flat import is_array
from jaxgrad.models import MLP


def make():
    return {
        "head": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.full(3, 0.1, jnp.bfloat16)},
        "layers": [jnp.arange(3), {"scale": jnp.array(2.0)}, None],
    }


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def blank(tree):
    return jax.tree.map(lambda x: jnp.zeros_like(x) if is_array(x) else x, tree)


@pytest.mark.parametrize(
    "params",
    [
        make(),
        MLP(4, (3,), 2, rngs=nnx.Rngs(0)),
        eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)),
    ],
    ids=["dict", "nnx", "equinox"],
)
def test_round_trip(tmp_path, params):
    jg.save(tmp_path / "a", params)
    into = blank(params)
    loaded = jg.load(tmp_path / "a", into)
    assert type(loaded) is type(params)
    flat = lambda t: [x for x in jax.tree.leaves(t) if hasattr(x, "dtype")]
    equal(flat(loaded), flat(params))
    assert not any(np.asarray(x).any() for x in flat(into))


def test_loads_into_shapes_only(tmp_path):
    params = make()
    jg.save(tmp_path / "a", params)
    equal(jg.load(tmp_path / "a", jax.eval_shape(lambda: params)), params)


def test_orbax_reads_it_too(tmp_path):
    from orbax.checkpoint import v1 as ocp

    jg.save(tmp_path / "a", {"head": [jnp.ones(2)]})
    assert ocp.metadata(tmp_path / "a").metadata["head"]["0"].shape == (2,)


def test_inspect(tmp_path):
    jg.save(tmp_path / "a", make(), trained="head/**", config={"classes": 3, "hidden": [4, 5]})
    info = jg.inspect(str(tmp_path / "a"))
    assert {path: (x.shape, str(x.dtype)) for path, x in info.leaves.items()} == {
        "head/bias": ((3,), "bfloat16"),
        "head/kernel": ((2, 3), "float32"),
        "layers/0": ((3,), "int32"),
        "layers/1/scale": ((), "float32"),
    }
    assert info.trained == ("head/bias", "head/kernel")
    assert info.config == {"classes": 3, "hidden": [4, 5]}


def test_nothing_is_overwritten_unasked(tmp_path):
    path = tmp_path / "a"
    jg.save(path, {"w": jnp.ones(2)})
    with pytest.raises(jg.CheckpointError, match=r"a' exists. Choose another path, or pass over"):
        jg.save(path, {"w": jnp.zeros(2)})
    jg.save(path, {"w": jnp.zeros(3)}, overwrite=True)
    assert jg.inspect(path).leaves["w"].shape == (3,)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("keep me")
    with pytest.raises(jg.CheckpointError, match="is not a checkpoint, so it is not replaced"):
        jg.save(other, {"w": jnp.zeros(2)}, overwrite=True)
    assert (other / "thesis.txt").read_text() == "keep me"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "other"]  # and nothing is left over


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    path = tmp_path / "a"
    jg.save(path, {"w": jnp.ones(2)})
    write = ocp.save

    def full_disk(*args, **kwargs):
        write(*args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        jg.save(path, {"w": jnp.zeros(2)}, overwrite=True)
    np.testing.assert_array_equal(jg.load(path, {"w": jnp.zeros(2)})["w"], [1, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_rename_that_fails_puts_back_what_was_there(tmp_path, monkeypatch):
    from pathlib import Path

    path, rename = tmp_path / "a", Path.rename
    jg.save(path, {"w": jnp.ones(2)})

    def refuse(self, target):
        if ".new-" in self.name:
            raise OSError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        jg.save(path, {"w": jnp.zeros(2)}, overwrite=True)
    np.testing.assert_array_equal(jg.load(path, {"w": jnp.zeros(2)})["w"], [1, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("into", "text"),
    [
        ({"w": jnp.ones(2), "c": jnp.ones(1)}, "it has 'b', which the tree does not"),
        ({"w": jnp.ones(2), "bb": jnp.ones(1)}, "it has no 'bb'"),
        (
            {"w": jnp.ones(3), "b": jnp.ones(1)},
            "does not fit the tree: 'w' is float32[2], in the tree float32[3]. Load it into the",
        ),
        (
            {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(1)},
            "'w' is float32[2], in the tree bfloat16[2].",
        ),
        (
            {"kernel": jnp.ones(2), "w2": jnp.ones(2), "b": jnp.ones(1)},
            "it has no 'w2' (nearest: 'w')",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, into, text):
    jg.save(tmp_path / "a", {"w": jnp.ones(2), "b": jnp.ones(1)})
    with pytest.raises(jg.CheckpointError) as info:
        jg.load(tmp_path / "a", into)
    assert text in str(info.value)


def test_numbers_keys_and_arrays_without_elements(tmp_path):
    tree = {
        "number": 2.5,
        "flag": True,
        "scalar": np.float32(0.5),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
    }
    jg.save(tmp_path / "a", tree)
    leaves = jg.inspect(tmp_path / "a").leaves
    assert leaves["keys"].dtype == tree["keys"].dtype and leaves["keys"].shape == (2,)
    assert leaves["empty"].shape == (0, 3) and leaves["flag"].dtype == bool
    loaded = jg.load(tmp_path / "a", tree)
    assert loaded["number"] == 2.5 and loaded["flag"] is True and loaded["scalar"] == 0.5
    assert loaded["empty"].shape == (0, 3) and loaded["empty"].dtype == jnp.bfloat16
    for name in ("key", "keys"):
        assert loaded[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(*map(jax.random.key_data, (loaded[name], tree[name])))
    with pytest.raises(jg.CheckpointError, match=r"'key' is key<fry>\[\], in the tree key<rbg>"):
        jg.load(tmp_path / "a", tree | {"key": jax.random.key(0, impl="rbg")})


def test_64_bits_are_not_lost_in_silence(tmp_path):
    tree = {"w": np.array([1 / 3, 2 / 3])}
    jg.save(tmp_path / "a", tree)
    with pytest.raises(
        jg.CheckpointError, match=r"'w' is float64\[2\] in .*, and JAX reads float32"
    ):
        jg.load(tmp_path / "a", tree)
    jax.config.update("jax_enable_x64", True)
    try:
        np.testing.assert_array_equal(jg.load(tmp_path / "a", tree)["w"], tree["w"])
    finally:
        jax.config.update("jax_enable_x64", False)


def test_without_a_tree_the_paths_decide(tmp_path):
    params = make() | {"number": 2.5, "key": jax.random.key(3), "empty": jnp.zeros((0, 3))}
    jg.save(tmp_path / "a", params)
    loaded = jg.load(tmp_path / "a")
    scale = params["layers"][1]["scale"]
    equal(loaded["layers"], {"0": params["layers"][0], "1": {"scale": scale}})
    equal(loaded["head"], params["head"])
    assert loaded["number"] == 2.5 and loaded["empty"].shape == (0, 3)
    assert loaded["key"] == params["key"]
    assert [*jg.load(tmp_path / "a", wrt="key")] == ["key"]
    part = jg.load(tmp_path / "a", wrt=["layers/**", "!**/scale"])
    equal(part, {"layers": {"0": params["layers"][0]}})
    with pytest.raises(jg.SelectionError, match="'headd' matches no leaf"):
        jg.load(tmp_path / "a", wrt="headd")


def test_a_part_is_saved(tmp_path):
    params = make()
    jg.save(tmp_path / "a", params, wrt="head/**", trained="**/bias")
    assert sorted(jg.inspect(tmp_path / "a").leaves) == ["head/bias", "head/kernel"]
    assert jg.inspect(tmp_path / "a").trained == ("head/bias",)
    equal(jg.load(tmp_path / "a", blank(params), wrt="head/**")["head"], params["head"])
    with pytest.raises(jg.CheckpointError, match="it has no 'layers/0'"):
        jg.load(tmp_path / "a", blank(params))
    with pytest.raises(jg.SelectionError, match="'haed' matches no leaf"):
        jg.save(tmp_path / "b", params, wrt="haed")
    assert not (tmp_path / "b").exists()


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    jg.save(tmp_path / "a", {"head": jnp.ones(2), "trunk": jnp.ones(4)})
    seen = []
    monkeypatch.setattr(_arrays, "checksum", lambda p, x: seen.append(p) or checksum(p, x))
    jg.load(tmp_path / "a", wrt="head")
    assert seen == ["head"]


def test_a_checkpoint_has_no_steps(tmp_path):
    jg.save(tmp_path / "a", {"w": jnp.ones(2)})
    for step in (3, "best"):
        with pytest.raises(
            jg.CheckpointError, match=f"step={step!r}: '.*/a' is not the directory of a run, so it"
        ):
            jg.load(tmp_path / "a", step=step)


def test_what_was_saved_has_checksums(tmp_path):
    from orbax.checkpoint import v1 as ocp

    tree = {"w": jnp.ones(2), "v": jnp.ones(3)}
    jg.save(tmp_path / "a", tree)
    record = ocp.metadata(tmp_path / "a").custom_metadata
    ocp.save(tmp_path / "b", tree | {"w": jnp.array([1, 2.0])}, custom_metadata=record)
    with pytest.raises(
        jg.CheckpointError, match=r"/b' is damaged: the checksum of 'w' is wrong. Load an earlier"
    ):
        jg.load(tmp_path / "b", tree)
    ocp.save(tmp_path / "c", {"w": jnp.ones(2)}, custom_metadata=record)
    with pytest.raises(jg.CheckpointError, match="the checksum of 'v' is wrong"):
        jg.load(tmp_path / "c", {"w": jnp.ones(2)})


def test_a_tree_that_others_saved_with_orbax(tmp_path):
    from orbax.checkpoint import v1 as ocp

    tree = {"layers": [jnp.ones(2), None, jnp.arange(3)], "opt": optax.adam(0.1).init(jnp.ones(2))}
    ocp.save(tmp_path / "a", tree, custom_metadata={"config": {"classes": 3}, "step": 3})
    info = jg.inspect(tmp_path / "a")
    assert sorted(info.leaves) == ["layers/0", "layers/2", "opt/0/count", "opt/0/mu", "opt/0/nu"]
    assert info.trained == () and info.config == {}
    into = {"layers": [jnp.zeros(2), None, jnp.zeros(3, jnp.int32)]}
    loaded = jg.load(tmp_path / "a", into, wrt="layers/**")
    equal(loaded, {"layers": tree["layers"]})
    loaded = jg.load(tmp_path / "a")
    equal(loaded["layers"], {"0": tree["layers"][0], "2": tree["layers"][2]})
    assert sorted(loaded["opt"]["0"]) == ["count", "mu", "nu"]


def test_a_config_that_json_can_not_hold(tmp_path):
    with pytest.raises(jg.CheckpointError, match=r"config holds what JSON can't: .*\{'x': \{1\}\}"):
        jg.save(tmp_path / "a", {"w": jnp.ones(1)}, config={"x": {1}})
    assert not any(tmp_path.iterdir())


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at '.*nowhere': there is no such"):
        jg.inspect(tmp_path / "nowhere")
    with pytest.raises(jg.CheckpointError, match="is not an Orbax checkpoint, or a damaged one"):
        jg.inspect(tmp_path)
    (tmp_path / "file").write_text("hello")
    with pytest.raises(jg.CheckpointError, match="is not an Orbax checkpoint, or a damaged one"):
        jg.inspect(tmp_path / "file")


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({}, "this tree has none with an element"),
        ({"a": jnp.zeros((0, 3))}, "this tree has none with an element"),
        (jnp.ones(2), "this tree has one without a name"),
        ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "this tree has two at 'a/b'"),
        ({"a/b": jnp.ones(2), "a": jnp.ones(2)}, "this tree has one at 'a' and others below it"),
    ],
)
def test_trees_that_have_no_paths(tmp_path, tree, text):
    with pytest.raises(jg.CheckpointError, match=text):
        jg.save(tmp_path / "a", tree)
    assert not (tmp_path / "a").exists()
