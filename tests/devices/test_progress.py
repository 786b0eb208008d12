import jax.numpy as jnp
import numpy as np

import jaxgrad as jg
from jaxgrad._devices.progress import progress_bar


def test_a_bar_needs_a_terminal_and_show(monkeypatch, capsys):
    for color, show, seen in [("", True, False), ("1", False, False), ("1", True, True)]:
        monkeypatch.setenv("FORCE_COLOR", color)
        with progress_bar(3, "starting", show) as advance:
            advance(1, "first of three")
        err = capsys.readouterr().err
        assert ("first of three" in err) == seen and bool(err) == seen


def test_staging_shows_the_frozen_part_on_a_terminal(monkeypatch, capsys, tmp_path):
    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["trunk"]) @ params["head"])

    data = np.ones((8, 64), np.float32)
    params = {"trunk": jnp.ones((64, 4)), "head": jnp.ones(4)}
    staged = jg.stage(loss, params, data, "head")
    monkeypatch.setenv("FORCE_COLOR", "1")
    for where in ("device", "host", tmp_path):
        staged.prepare(data, where=where)
        assert "frozen part" in capsys.readouterr().err
    staged.prepare(data, progress=False)
    assert capsys.readouterr().err == ""
