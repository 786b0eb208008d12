"""The public face: each name once, and nothing loaded before it is used."""

import json
import subprocess
import sys

import pytest

import jaxgrad as jg


def loaded(code):
    """The modules that a new process has after some lines."""
    script = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def test_every_public_name_is_there():
    assert len(jg.__all__) == len({*jg.__all__}) > 60
    assert {*jg.__all__} <= {*dir(jg)}
    assert all(getattr(jg, name) is not None for name in jg.__all__)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="haed"):
        jg.haed  # noqa: B018


def test_the_import_loads_neither_jax_nor_flax():
    found = loaded("import jaxgrad")
    assert not {"jax", "flax", "numpy", "orbax"} & found
    assert {m for m in found if m.startswith("jaxgrad")} == {"jaxgrad"}


def test_gradients_load_no_flax():
    assert "flax" not in loaded("import jaxgrad as jg; jg.value_and_grad, jg.param_groups")


def test_a_run_of_a_dict_is_resumed_without_flax_and_without_the_reader_of_pytorchs_files(tmp_path):
    found = loaded(
        f"""
import jax, jax.numpy as jnp, optax, jaxgrad as jg
for epochs in (1, 2):
    state = jg.fit(
        lambda p, b: jnp.mean((b["x"] * p["w"] - b["y"]) ** 2),
        {{"w": jnp.zeros(())}}, {{"x": jnp.ones(8), "y": jnp.ones(8)}}, optax.sgd(0.1),
        epochs=epochs, batch_size=4, checkpoint={str(tmp_path / "run")!r}, resume=True,
        progress=False,
    )
assert state.step == 4
"""
    )
    assert not {m for m in found if m.startswith(("flax", "jaxgrad.torch"))}
