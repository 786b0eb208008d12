"""The notebooks are committed executed, show pictures, run, and translations agree."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
# A cell whose printed text is not the same in each run, as a time, has this tag.
VARIES = "varies"

NOTEBOOKS = sorted(
    path.relative_to(FOLDER)
    for path in FOLDER.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
TRANSLATED = [path for path in NOTEBOOKS if path.parts[0] == "es"]

# A path of the machine that ran the notebook, and an address in its memory.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(tmp|work|home|root|usr|opt|var|private|Users|mnt)\b")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
PICTURES = {"image/png", "image/svg+xml"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=str)


def read(path: Path) -> Any:
    return nbformat.read(FOLDER / path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(outputs: list[Any]) -> Iterator[tuple[str, str]]:
    """What can be read in outputs, by kind: text, HTML, drawings, but no pixels."""
    for output in outputs:
        if output.output_type == "stream":
            yield output.name, output.text
        for kind, data in output.get("data", {}).items():
            if isinstance(data, str) and kind != "image/png":
                yield kind, re.sub(r"data:[^\"')]*", "", data)


def problems(notebook: Any) -> Iterator[str]:
    """What keeps a notebook from being committed."""
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        yield "it is not in format 4.5"
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "its kernel is not python3"
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) < len(ids):
        yield "cells have no ids of their own"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"it was not run from top to bottom: {counts}"
    for n, cell in enumerate(cells, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {n} failed: {output.ename}"
        pictures = PICTURES & {k for o in cell.outputs for k in o.get("data", {})}
        if pictures and not cell.metadata.get("alt"):
            yield f"cell {n} shows a picture, and its metadata has no 'alt' to say which"
        for kind, text in [("source", cell.source), *texts(cell.outputs)]:
            if kind == "stderr":
                yield f"cell {n} wrote to stderr: {text[:80]}"
            if found := ABSOLUTE_PATH.search(text) or ADDRESS.search(text):
                yield f"cell {n} has '{found[0]}' in its {kind}"
    if not PICTURES & {k for c in cells for o in c.outputs for k in o.get("data", {})}:
        yield "it shows no picture"


@each
def test_is_committed_executed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert list(problems(notebook)) == []


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("4.5", lambda nb: nb.update(nbformat_minor=4)),
        ("kernel", lambda nb: nb.metadata.clear()),
        ("ids", lambda nb: nb.cells[0].pop("id")),
        ("ids", lambda nb: nb.cells[0].update(id=nb.cells[1].id)),
        ("top to bottom", lambda nb: nb.cells[1].update(execution_count=None)),
        ("failed", lambda nb: nb.cells[1].outputs.append(error())),
        ("stderr", lambda nb: nb.cells[1].outputs.append(stream("stderr", "a warning"))),
        ("source", lambda nb: nb.cells[1].update(source="open('/tmp/x')")),
        ("stdout", lambda nb: nb.cells[1].outputs.append(stream("stdout", "in /home/me"))),
        ("at 0x", lambda nb: nb.cells[1].outputs.append(stream("stdout", "<f at 0x7f00>"))),
        ("it shows no picture", lambda nb: nb.cells[1].outputs.clear()),
        ("'alt'", lambda nb: nb.cells[1].metadata.clear()),
    ],
)
def test_problems_are_found(kind, spoil):
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        nbformat_minor=5,
        cells=[
            nbformat.v4.new_markdown_cell("# See https://a.org/home/x and `docs/tmp`."),
            nbformat.v4.new_code_cell(
                "1 /2",
                execution_count=1,
                metadata={"alt": "a slash"},
                outputs=[
                    # Pixels may spell anything.
                    nbformat.v4.new_output(
                        "display_data", {"image/png": "/tmp/", "text/plain": "x"}
                    )
                ],
            ),
        ],
    )
    assert list(problems(notebook)) == []
    spoil(notebook)
    found = list(problems(notebook))
    assert len(found) == 1 and kind in found[0]


def error() -> Any:
    return nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])


def stream(name: str, text: str) -> Any:
    return nbformat.v4.new_output("stream", name=name, text=text)


@pytest.mark.slow
@each
def test_runs_from_top_to_bottom(path, tmp_path):
    folder = tmp_path / "notebooks"
    shutil.copytree(FOLDER, folder)
    files = sorted(folder.rglob("*"))
    notebook = read(path)
    client = NotebookClient(
        notebook,
        timeout=300,  # a cell that hangs: how long a whole notebook takes is no matter of a test
        kernel_name="python3",
        resources={"metadata": {"path": str((folder / path).parent)}},
    )
    client.execute()
    assert list(problems(notebook)) == []
    assert sorted(folder.rglob("*")) == files  # what it writes goes to a temporary directory


@pytest.mark.parametrize("path", TRANSLATED, ids=str)
def test_a_translation_has_the_same_code_and_output(path):
    translated, original = read(path), read(path.relative_to("es"))
    assert [c.cell_type for c in translated.cells] == [c.cell_type for c in original.cells]
    for ours, theirs in zip(translated.cells, original.cells, strict=True):
        if ours.cell_type != "code":
            assert ours.source != theirs.source  # it is translated
            continue
        assert ours.source == theirs.source
        if VARIES not in theirs.metadata.get("tags", []):
            assert plain(ours) == plain(theirs)


def plain(cell: Any) -> str:
    # What is printed may arrive in one piece or in several.
    return "".join(text for kind, text in texts(cell.outputs) if kind in ("stdout", "text/plain"))
