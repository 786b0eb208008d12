import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from jaxgrad._jaxpr.inline import inline
from jaxgrad._staging.dependence import Constant, PerExample, Varying, classify

TABLE = jnp.arange(28.0).reshape(7, 4)
KERNEL = jnp.linspace(-1, 1, 3 * 4 * 5).reshape(3, 4, 5)
SPEC = ("NWC", "WIO", "NWC")

MYSTERY = Primitive("mystery")
MYSTERY.def_abstract_eval(lambda x: x)


def place(fun, rows=6):
    """The class of `fun(x)` with `x` of `[rows, 4, 6]`, and what was refused."""
    first, second = (
        inline(jax.make_jaxpr(fun)(jnp.ones((n, 4, 6))), [False]) for n in (rows, 2 * rows)
    )
    places = [*(Constant() for _ in first.consts), PerExample(0)]
    classes = classify(first.jaxpr, second.jaxpr, (rows, 2 * rows), places)
    (out,) = first.jaxpr.outvars
    return classes[out], list(classes.refusals)


def index(x):
    return jnp.clip(jnp.abs(x[:, 0, 0] * 3).astype(int), 0, 3)


PER_EXAMPLE = {
    "elementwise": (lambda x: jnp.where(x > 0, jnp.exp(x), 2 * x), 0),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 3, 4, 6)), 0),
    "broadcast of a constant": (lambda x: jnp.broadcast_to(TABLE, (x.shape[0], 7, 4)), 0),
    "high word of a product": (lambda x: lax.mulhi(*[(x * 1e9).astype(int)] * 2), 0),
    "logarithm to base 2": (lambda x: jnp.log2(jnp.abs(x)), 0),
    "polynomial": (lambda x: jnp.polyval(TABLE[0], x), 0),
    "slope of tanh": (lambda x: jax.jvp(jnp.tanh, (x,), (x,))[1], 0),
    "transpose": (lambda x: x.transpose(2, 0, 1), 1),
    "flatten": (lambda x: x.reshape(x.shape[0], -1), 0),
    "fold into the batch": (lambda x: jnp.tanh(x.reshape(-1, 6)), 0),
    "fold and unfold": (lambda x: x.reshape(-1, 2, 6).reshape(-1, 4, 6), 0),
    "behind an axis": (lambda x: x.transpose(1, 0, 2).reshape(2, 2, -1, 6), 2),
    "reduce others": (lambda x: x.sum((1, 2)), 0),
    "argmax": (lambda x: x.transpose(1, 0, 2).argmax(2), 1),
    "softmax": (lambda x: jax.nn.softmax(x, -1), 0),
    "matrix product": (lambda x: x @ jnp.ones((6, 5)), 0),
    "matrix product from the left": (lambda x: jnp.einsum("oi,bti->tob", jnp.ones((5, 6)), x), 2),
    "attention": (lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2), -1) @ x, 0),
    "convolution": (
        lambda x: lax.conv_general_dilated(
            x.swapaxes(1, 2), KERNEL, (1,), "SAME", dimension_numbers=SPEC
        ),
        0,
    ),
    "pooling": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID"),
        0,
    ),
    "slice": (lambda x: x[:, 1:3, ::2], 0),
    "dynamic slice": (lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(TABLE[0]), 1, 1), 0),
    "update": (lambda x: lax.dynamic_update_slice_in_dim(x, x[:, :2] * 2, 1, 1), 0),
    "concatenate": (lambda x: jnp.concatenate([x, x * 2], 1), 0),
    "stack in front": (lambda x: jnp.stack([x, x * 2]), 1),
    "stack behind": (lambda x: jnp.stack([x, x * 2], 1), 0),
    "unstack": (lambda x: jnp.unstack(x, axis=2)[1], 0),
    "unstack what is in front": (lambda x: jnp.unstack(x.swapaxes(0, 1))[1], 0),
    "tile others": (lambda x: jnp.tile(x, (1, 2, 3)), 0),
    "tile what is in front": (lambda x: jnp.tile(x.reshape(-1, 6), (2, 1, 3)), 1),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 2))), 0),
    "split": (lambda x: jnp.split(x, 2, 1)[1], 0),
    "roll and flip others": (lambda x: jnp.flip(jnp.roll(x, 1, 1), 2), 0),
    "cumsum of others": (lambda x: jnp.cumsum(x, 1), 0),
    "sort others": (lambda x: jnp.sort(x, 2), 0),
    "top k": (lambda x: lax.top_k(x, 2)[0], 0),
    "embedding": (lambda x: TABLE[index(x)], 0),
    "set a column": (lambda x: x.at[:, 0].set(1.0), 0),
    "set columns": (lambda x: x.at[:, jnp.array([3, 0])].add(x[:, :2]), 0),
    "set its own columns": (lambda x: jax.vmap(lambda a, i: a.at[i].set(0.0))(x, index(x)), 0),
    "set behind an axis": (lambda x: x.swapaxes(0, 1).at[0].set(x[:, 2] * 2), 1),
    "take columns": (lambda x: x[:, jnp.array([3, 0, 0])], 0),
    "take along": (lambda x: jnp.take_along_axis(x, index(x)[:, None, None], 1), 0),
    "index in vmap": (jax.vmap(lambda row: row[jnp.argmax(row[:, 0])]), 0),
    "fft": (lambda x: jnp.abs(jnp.fft.rfft(x, axis=-1)), 0),
    "cholesky": (lambda x: jnp.linalg.cholesky(x @ x.swapaxes(1, 2) + jnp.eye(4)[None]), 0),
    "eigenvalues": (lambda x: lax.linalg.eig(x[:, :, :4])[0], 0),
    "schur": (lambda x: lax.linalg.schur(x[:, :, :4])[0], 0),
    "hessenberg": (lambda x: lax.linalg.hessenberg(x[:, :, :4])[0], 0),
    "tridiagonal": (lambda x: lax.linalg.tridiagonal(x @ x.swapaxes(1, 2))[1], 0),
    "pivots": (lambda x: lax.linalg.lu_pivots_to_permutation(lax.linalg.lu(x)[1], 5), 0),
    "barrier": (lambda x: lax.optimization_barrier((x, TABLE))[0], 0),
    "scan over others": (
        lambda x: lax.scan(lambda c, r: (c + r, c), x[:, 0], x.swapaxes(0, 1))[1],
        1,
    ),
    "map over examples": (lambda x: lax.map(lambda row: row.sum(0), x), 0),
    "fori loop": (lambda x: lax.fori_loop(0, 3, lambda i, h: jnp.sin(h) * i, x), 0),
    "cond": (lambda x: lax.cond(TABLE[0, 0] > 0, jnp.sin, jnp.cos, x), 0),
}

MIXING = {
    "mean over the batch": (lambda x: x - x.mean(0, keepdims=True), "reduces over the examples"),
    "gram matrix": (lambda x: x[:, 0] @ x[:, 0].T, "multiplies each example with the others"),
    "sum over rows in a product": (
        lambda x: jnp.einsum("bi,bj->ij", x[:, 0], x[:, 1]),
        "multiplies and sums over the examples",
    ),
    "attention over the batch": (
        lambda x: jax.nn.softmax(x[:, 0] @ x[:, 0].T, -1) @ x[:, 0],
        "multiplies each example with the others",
    ),
    "cumsum": (lambda x: jnp.cumsum(x, 0), "accumulates along the examples"),
    "sort": (lambda x: jnp.sort(x, 0), "sorts the examples"),
    "flip": (lambda x: jnp.flip(x, 0), "reverses the order of the examples"),
    "roll": (lambda x: jnp.roll(x, 1, 0), "depends on the size of the batch"),
    "shift": (lambda x: jnp.concatenate([x[1:], x[:1]]), "picks some examples"),
    "first example": (lambda x: x * x[:1], "picks some examples"),
    "permutation": (lambda x: x[jnp.argsort(x[:, 0, 0])], "position in the batch"),
    "index by the examples": (lambda x: x[index(x)], "depends on the size of the batch"),
    "join with itself": (lambda x: jnp.concatenate([x, x]), "joins batches"),
    "tile the batch": (lambda x: jnp.tile(x, (2, 1, 1)), "tile at .* repeats the batch"),
    "pad the batch": (
        lambda x: jnp.pad(x, ((1, 1), (0, 0), (0, 0))),
        "not a multiple of the batch size",
    ),
    "split the batch": (
        lambda x: jnp.split(x, 2)[0] * jnp.split(x, 2)[1],
        "depends on the size of the batch",
    ),
    "transposed fold": (
        lambda x: x.transpose(1, 0, 2).reshape(-1, 6),
        "no longer one contiguous row",
    ),
    "two into one": (lambda x: x.reshape(2, -1, 4, 6).sum(0), "not a multiple of the batch size"),
    "position": (
        lambda x: x + jnp.arange(x.shape[0], dtype=x.dtype)[:, None, None],
        "position in the batch",
    ),
    "batch size": (lambda x: x / x.shape[0], "depends on the size of the batch"),
    "batch size as exponent": (lambda x: x ** (x.shape[0]), "depends on the size of the batch"),
    "index into other examples": (
        lambda x: jnp.take_along_axis(x[:, 0], index(x)[:, None], 0),
        "depends on the size of the batch",
    ),
    "stride over the batch": (lambda x: x[::2], "not a multiple of the batch size"),
    "window over the batch": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (3, 1, 1), (1, 1, 1), "SAME"),
        "slides a window along the examples",
    ),
    "batch as channels": (
        lambda x: lax.conv_general_dilated(
            x.transpose(1, 2, 0), jnp.ones((1, x.shape[0], 3)), (1,), "SAME", dimension_numbers=SPEC
        ),
        "kernel that depends on the examples",
    ),
    "fft over the batch": (
        lambda x: jnp.abs(jnp.fft.fft(x[:, 0].T)),
        "depends on the size of the batch",
    ),
    "scan over the batch": (
        lambda x: lax.scan(lambda c, r: (c + r, c), x[0] * 0, x)[1],
        "picks some examples",
    ),
    "carry over the batch": (
        lambda x: lax.scan(lambda c, r: (c + r, c), jnp.zeros((4, 6)), x)[1],
        "steps through the examples",
    ),
    "mean in a scan": (
        lambda x: lax.scan(lambda h, _: (h - h.mean(0, keepdims=True), None), x, length=2)[0],
        "contains reduce_sum at .*test_batch_axis.py.*, which reduces over the examples",
    ),
    "random numbers per position": (
        lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
        "position in the batch",
    ),
    "scatter to some examples": (lambda x: x.at[:2].set(1.0), "writes to some examples"),
    "sums of groups": (
        lambda x: jax.ops.segment_sum(x, index(x), 4),
        "scatter-add at .* writes examples into an array that has none of them",
    ),
    "callback": (
        lambda x: jax.pure_callback(lambda a: a, x, x),
        "pure_callback at .* calls a Python function, which may do anything with the batch",
    ),
    "seeds": (
        jax.vmap(lambda row: jax.random.bits(jax.random.key(index(row[None])[0]))),
        "random_seed at .* makes random keys, whose axes are not followed",
    ),
    "unknown primitive": (
        lambda x: MYSTERY.bind(x),
        "mystery at .* has no rule for the rows of a batch",
    ),
    "while until all are done": (
        lambda x: lax.while_loop(lambda h: jnp.any(h < 5), lambda h: h + 1, x),
        "contains reduce_or",
    ),
}


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_the_batch_axis_is_followed(name):
    fun, axis = PER_EXAMPLE[name]
    found, refusals = place(fun)
    assert isinstance(found, PerExample) and found.axis == axis, refusals
    # And what was proven is so: the same example among others, at another place.
    draw = np.random.default_rng(0).normal(size=(2, 6, 4, 6)).astype(np.float32)
    x, others = jnp.asarray(draw[0]), jnp.asarray(draw[1]).at[4].set(draw[0][1])
    alone, among = (found.rows_first(fun(batch)) for batch in (x, others))
    np.testing.assert_allclose(alone[1], among[4], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.restored(alone), fun(x))


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_examples_is_refused(name):
    fun, reason = MIXING[name]
    found, refusals = place(fun)
    assert isinstance(found, Varying) and found.because is not None, found
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError("; ".join(map(str, refusals)))
    assert any("test_batch_axis.py" in r.source for r in refusals)


def test_a_constant_stays_one():
    found, _ = place(lambda x: jnp.cumsum(TABLE) + 0 * jnp.arange(28.0))
    assert found == Constant()


def test_a_batch_as_large_as_another_size_is_not_taken_for_it():
    found, refusals = place(lambda x: x.swapaxes(0, 1)[:, :, :1] * jnp.ones((4, 1, 1)), rows=4)
    assert found == PerExample(1), refusals


def test_noise_without_a_key_is_no_constant():
    refused = place(lambda x: x * lax.rng_uniform(0.0, 1.0, ()))[1]
    assert "draws random values" in str(refused[0])
