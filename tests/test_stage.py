import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad import _cut

from .losses import CASES, ROWS


@pytest.fixture(autouse=True)
def _storing_is_cheap(monkeypatch):
    """The models here are so small that storing anything would cost more than computing it."""
    monkeypatch.setattr(_cut, "FLOPS_PER_BYTE", 1e-6)


def batch_of(data, rows):
    return jax.tree.map(lambda a: a[rows], data)


def close(a, b, tolerance):
    a, b = (jax.tree.leaves(x) for x in (a, b))
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def scalar(loss):
    """The loss alone, where it has auxiliary outputs."""

    def first(*args):
        out = loss(*args)
        return out[0] if isinstance(out, tuple) else out

    return first


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("x64", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_staged_equals_unstaged(name, x64, tolerance):
    # Flax itself mixes dtypes: float32 statistics in a float64 model.
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        loss, params, data, wrt = CASES[name]()
        staged = jg.stage(loss, params, batch_of(data, slice(6)), wrt)
        assert staged.report().staged, staged
        features = staged.prepare(data)
        trainable, frozen = jg.partition(params, wrt)

        def unstaged(trainable, batch):
            return loss(jg.merge(trainable, frozen), batch)

        steps = [
            jax.jit(jax.value_and_grad(scalar(staged.loss))),
            jax.jit(jax.value_and_grad(scalar(unstaged))),
        ]
        order = np.random.default_rng(0).permutation(ROWS)
        ours = theirs = trainable
        for rows in np.split(order, range(6, ROWS, 6)):  # the last batch is short
            value, grads = steps[0](ours, features[rows])
            expected, expected_grads = steps[1](theirs, batch_of(data, rows))
            close((value, grads), (expected, expected_grads), tolerance)
            assert max(jnp.abs(g).max() for g in jax.tree.leaves(grads)) > 0
            ours, theirs = (
                jax.tree.map(lambda p, g: p - 0.1 * g, p, g)
                for p, g in ((ours, grads), (theirs, expected_grads))
            )
        close(ours, theirs, tolerance)
