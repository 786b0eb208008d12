import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg
from jaxgrad._training import fingerprint as module
from jaxgrad._training.fingerprint import fingerprint

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(29, 3)), "y": np.arange(29)}


def test_the_same_arrays_have_one_fingerprint_wherever_they_are():
    found = fingerprint(DATA)
    assert found == fingerprint(jax.tree.map(jnp.asarray, DATA))
    assert found == fingerprint({k: v.astype(v.dtype.newbyteorder()) for k, v in DATA.items()})
    assert found["x"].startswith("float32[29,3] ") and found["y"].startswith("int32[29] ")
    assert fingerprint(DATA["x"]) == {"": found["x"]}
    with jax.enable_x64(True):
        assert fingerprint(DATA)["x"].startswith("float64[29,3] ")


@pytest.mark.parametrize("limit", [module._BYTES, 64])
@pytest.mark.parametrize(
    "change", [lambda x: x[::-1], lambda x: -x, lambda x: x / 255, lambda x: np.roll(x, 1, 0)]
)
def test_other_rows_have_another(monkeypatch, limit, change):
    monkeypatch.setattr(module, "_BYTES", limit)
    found, other = fingerprint(DATA), fingerprint({**DATA, "x": change(DATA["x"])})
    assert found["x"] != other["x"] and found["y"] == other["y"]
    assert fingerprint({"x": DATA["x"].reshape(29, 3, 1)})["x"] != found["x"]


def test_what_is_not_a_number():
    holes = DATA["x"].copy()
    holes[3] = np.nan
    assert fingerprint(holes) == fingerprint(holes.copy()) != fingerprint(DATA["x"])
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in (0, 0, 1)]
    same, again, other = map(fingerprint, keys)
    assert same == again != other and same[""].startswith("threefry2x32 uint32[4,2] ")
    words = [np.array(["a", {"b": 1}], object), np.array(["a", {"b": 1}], object)]
    assert fingerprint(words[0]) == fingerprint(words[1])
    assert fingerprint(jnp.ones((4, 2), jnp.bfloat16))[""].startswith("bfloat16[4,2] ")


class Watched:
    """An array in a file, which counts the rows that are read."""

    shape, dtype, read = (10**6, 1000), np.dtype("uint8"), 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        assert (np.diff(rows) > 0).all() and rows[0] == 0 and rows[-1] == len(self) - 1
        self.read += len(rows)
        return np.zeros((len(rows), 1000), np.uint8)


def test_a_large_file_is_not_read():
    large = Watched()
    assert fingerprint(large) == fingerprint(Watched())
    assert 4000 < large.read <= 4096


@pytest.mark.parametrize("resident", [np.asarray, jnp.asarray])
def test_a_run_is_not_resumed_with_other_data(tmp_path, resident):
    def fit(data, **options):
        loss = lambda p, b: jnp.mean((b["x"] @ p["w"] - b["y"].astype(jnp.float32)) ** 2)
        data = jax.tree.map(resident, data)
        start, run = {"w": jnp.ones(3)}, tmp_path / "run"
        return jg.fit(loss, start, data, optax.sgd(0.1), checkpoint=run, batch_size=4, **options)

    fit(DATA, epochs=1)
    with pytest.raises(jg.CheckpointError) as info:
        fit({**DATA, "y": -DATA["y"]}, epochs=2, resume=True)
    then, now = (fingerprint(y)[""] for y in (DATA["y"], -DATA["y"]))
    assert str(info.value) == (
        f"the run in '{tmp_path / 'run'}' has other data (dtype, shape and a digest of rows): 'y' "
        f"was {then} and is {now}. Pass the arrays of the run with their rows in the same order, "
        "or start a new run from its parameters: jaxgrad.load(run, into=params)."
    )
    with pytest.raises(jg.CheckpointError, match="'z' was not there and is int32"):
        fit({**DATA, "z": DATA["y"]}, epochs=2, resume=True)
    assert fit(DATA, epochs=2, resume=True).resumed == "resumed at step 8"
