"""Runs every snippet of `docs/parity.md`, and compares the results with each other and the page."""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxgrad as jg

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"


class Row(NamedTuple):
    title: str
    torch: str
    jax: str
    shown: str


def rows():
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]:
        title = section.splitlines()[0]
        first, second = re.findall(r"```python\n(.*?)```", section, re.S)
        shown = re.findall(r"^Both: `(.*)`$", section, re.M)
        assert first.startswith("# PyTorch\n"), title
        assert second.startswith(("# JAX\n", "# jaxgrad\n")), title
        assert ("JAX needs no helper" in section) <= second.startswith("# JAX\n"), title
        assert len(shown) == 1, title
        yield Row(title, first, second, shown[0])


ROWS = list(rows())
by_title = pytest.mark.parametrize("row", ROWS, ids=[row.title for row in ROWS])


def run(source: str, **names: Any) -> Any:
    exec(compile(source, str(PAGE), "exec"), names)
    return names["result"]


def of_jax(row: Row) -> Any:
    return run(row.jax, jax=jax, jnp=jnp, optax=optax, jg=jg)


def shown(result: Any) -> str:
    """A result as the page has it."""
    if isinstance(result, tuple | list):
        return ", ".join(map(shown, result))
    if result is None or isinstance(result, bool):
        return str(result)
    rounded = np.asarray(result).astype("float64").round(4) + 0.0  # no negative zeros
    return str(rounded.tolist())


@by_title
def test_the_page_has_the_numbers(row):
    assert shown(of_jax(row)) == row.shown


@pytest.mark.torch
@by_title
def test_both_sides_are_equal(row):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of its own parts
        theirs = run(row.torch, torch=torch)
    ours = of_jax(row)
    ours, theirs = ([*r] if isinstance(r, tuple | list) else [r] for r in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if b is None or isinstance(b, bool):
            assert a is b
        else:
            b = b.detach().numpy() if isinstance(b, torch.Tensor) else b
            assert np.shape(a) == np.shape(b)
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_every_part_of_autograd_has_a_row():
    titles = " ".join(row.title for row in ROWS)
    for part in (
        "requires_grad", "backward(gradient", "retain_graph", "create_graph", "inputs",
        "accumulation", "zero_grad", "no_grad", "detach", "inference_mode", "register_hook",
        "retain_grad", "autograd.Function", "gradcheck", "Anomaly", "jacobian", "hessian", "hvp",
        "vjp", "jvp", "checkpoint", "Forward mode", "functional_call", "Parameter groups",
        "state_dict",
    ):  # fmt: skip
        assert part in titles
