import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jaxgrad as jg
from jaxgrad._checkpoint import arrays as _arrays
from jaxgrad._checkpoint.record import Record
from jaxgrad._disk import safetensors as _safetensors


def write(path, arrays, **fields):
    _arrays.write(path, _arrays.encode(arrays), Record(**fields))


def load(path):
    return _arrays.load_leaves(_arrays.read(path))


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("dtype", sorted(_safetensors.DTYPES))
def test_every_dtype_of_the_file_comes_back(tmp_path, dtype):
    with jax.enable_x64(True):
        random = np.random.default_rng(0).integers(0, 2, (3, 4, 16), np.uint8)
        x = random.reshape(3, -1).view(jnp.dtype(dtype))
        arrays = {"a/x": jnp.asarray(x), "a/y": x[:, :1], "scalar": x[0, 0, None].reshape(())}
        write(tmp_path / "15", arrays, config={"step": 15})
        stored = _arrays.read(tmp_path / "15")
        assert {p: (s.shape, s.dtype) for p, s in stored.shapes.items()} == {
            p: (s.shape, s.dtype) for p, s in arrays.items()
        }
        assert stored.record.config == {"step": 15}
        loaded = _arrays.load_leaves(stored)
        assert {p: bits(v) for p, v in loaded.items()} == {p: bits(v) for p, v in arrays.items()}


def test_the_file_is_one_that_safetensors_opens(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "15", {"head/kernel": x})
    with safe_open(tmp_path / "15/arrays.safetensors", "np") as file:
        assert file.get_tensor("head/kernel").tolist() == x.tolist()


def test_wide_numbers_without_x64_are_an_error(tmp_path):
    write(tmp_path / "15", {"x": np.ones(3)})
    with pytest.raises(jg.CheckpointError, match=r"'x' is float64\[3\] .* JAX reads float32"):
        load(tmp_path / "15")


def test_nothing_of_a_file_is_kept(tmp_path):
    """Else a buffer that is donated would be written into the file, or outlive it."""
    write(tmp_path / "15", {"x": np.zeros(4096, np.float32)})
    loaded = load(tmp_path / "15")
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(loaded["x"])
    assert float(after.sum()) == 4096
    assert not np.asarray(load(tmp_path / "15")["x"]).any()
