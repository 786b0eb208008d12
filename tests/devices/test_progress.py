import jax.numpy as jnp
import nbclient
import nbformat
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


CELLS = """
import time
from jaxgrad._devices.progress import progress_bar
def work(show, **options):
    with progress_bar(4, "starting", show, **options) as advance:
        for i in range(4):
            advance(1, f"part {i + 1}")
            time.sleep(0.06)
# %%
work(True)
# %%
work(False)
# %%
work(True, transient=True)
# %%
work(True, done=4) or 1 / 0
"""


def test_a_notebook_shows_one_line_that_moves(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # some servers set it: no escapes in the text
    texts = CELLS.split("# %%")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(t) for t in texts])
    nbclient.NotebookClient(
        notebook, timeout=100, kernel_name="python3", allow_errors=True
    ).execute()
    _, shown, hidden, transient, failed = ([*cell.outputs] for cell in notebook.cells)
    (line,) = shown
    text = line["data"]["text/plain"]
    assert "part 4" in text and "0:00:00" in text and text.count("━") == 40
    assert "\x1b" not in text and "\n" not in text
    assert hidden == []
    assert [out["data"] for out in transient] == [{"text/plain": ""}]
    assert [out.output_type for out in failed] == ["display_data", "error"]
