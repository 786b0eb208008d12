"""The pages name every public name once, and nothing that is not there."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

import jaxgrad as jg

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("notebooks/**/*.ipynb"), ROOT / "README.md"])
DESCRIBED = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]
MODULES = ("callbacks", "data", "models", "torch")


def public(module):
    """The names that a module offers: those it lists, or defines and gives a plain name."""
    listed = getattr(module, "__all__", None)
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", "").startswith("jaxgrad")
    ]
    return sorted(own if listed is None else listed)


def found(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_every_public_name_is_described_once():
    expected = {f"jaxgrad.{name}" for name in jg.__all__ if name not in MODULES}
    for name in MODULES:
        expected |= {f"jaxgrad.{name}.{x}" for x in public(getattr(jg, name))}
    assert sorted(expected - set(DESCRIBED)) == []
    assert sorted({name for name in DESCRIBED if DESCRIBED.count(name) > 1}) == []


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_has_a_docstring(name):
    value = found(name)
    assert name == "jaxgrad.Wrt" or inspect.getdoc(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_code_runs_but_where_it_takes_a_cluster():
    unrun = [
        (page.name, block.splitlines()[0])
        for page in [DOCS / "index.md", *sorted((DOCS / "guides").glob("*.md"))]
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
        if language != "sh" and not block.startswith(">>> ")
    ]
    (only,) = unrun
    assert only[0] == "devices.md"
    assert only[1].startswith("jax.distributed.initialize()")


def test_the_errors_that_are_explained_are_those_that_are_raised():
    source = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in (ROOT / "jaxgrad").rglob("*.py")
    )
    page = (DOCS / "guides/errors.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    texts = [re.search("`(.+?)`", row)[1] for row in rows if "`" in row]
    assert len(texts) > 10
    # A value or a name stands for what the source has in braces.
    text = re.compile(r"'[^']*'|\d+(?:, \d+)*|\bnan\b|\bSIGTERM\b")
    for shown in texts:
        pieces = [piece.strip() for piece in text.split(shown)]
        assert all(piece in source for piece in pieces), shown
