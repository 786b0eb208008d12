"""The form of JAX's programs, read in one place; and arrays that programs close over."""

import ast
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.extend import core as jex
from jax.sharding import PartitionSpec as P

import jaxgrad as jg
import jaxgrad._jaxpr
from jaxgrad._jaxpr import views
from jaxgrad._jaxpr.views import (
    Call,
    Checkpoint,
    Cond,
    CustomRule,
    Scan,
    ShardMap,
    bodies,
    opened,
    view,
)

X = jnp.linspace(0.1, 1, 6).reshape(2, 3)
W = jnp.linspace(-1, 1, 9).reshape(3, 3)


def the(fun, *args):
    """The only equation of a function that has a program inside, and its view."""
    found = [(e, v) for e in jax.make_jaxpr(fun)(*args).jaxpr.eqns if (v := view(e))]
    ((eqn, seen),) = found
    return eqn, seen


def primitives_of(body):
    return [e.primitive.name for e in body.jaxpr.eqns]


@jax.custom_vjp
def custom(x):
    return jnp.sin(x)


custom.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@pytest.mark.parametrize(
    ("fun", "kind"),
    [
        (jax.jit(jnp.sin), Call),
        (custom, CustomRule),
        (jax.nn.relu, CustomRule),
        (jax.checkpoint(jnp.sin), Checkpoint),
    ],
)
def test_calls(fun, kind):
    _, call = the(fun, X)
    assert type(call) is kind
    assert len(primitives_of(call.body)) == 1
    assert call.bodies == (call.body,)


def test_parts_of_a_scan():
    def fun(a, b, c, xs):
        turn = lambda carry, x: ((carry[0] * a + x, carry[1] + b), (x, carry[0]))
        return lax.scan(turn, (c, jnp.zeros(())), xs, reverse=True, unroll=2)

    args = jnp.ones(3), jnp.array(1.0), jnp.zeros(3), jnp.ones((4, 3))
    eqn, scan = the(fun, *args)
    assert (scan.consts, scan.carries, scan.fixed) == (2, 2, 4)
    assert (scan.length, scan.reverse, scan.unroll) == (4, True, 2)
    shapes = [sorted(v.aval.shape for v in part) for part in scan.parts(eqn.invars)]
    assert shapes == [[(), (3,)], [(), (3,)], [(4, 3)]]


def test_a_scan_over_fewer_turns():
    fun = lambda c, xs: lax.scan(lambda c, x: (c + x, c), c, xs)
    eqn, scan = the(fun, jnp.zeros(3), jnp.ones((4, 3)))
    outs = scan.bind(eqn, [jnp.ones(3), X], 2)
    for a, b in zip(outs, fun(jnp.ones(3), X), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_of_a_scan_without_some():
    _, bare = the(lambda: lax.scan(lambda c, _: (c, None), None, None, length=3))
    assert (bare.consts, bare.carries, bare.length) == (0, 0, 3)
    _, stacks = the(lambda xs: lax.scan(lambda c, x: (c, x + 1), None, xs)[1], X)
    assert (stacks.consts, stacks.carries, stacks.parts("x")) == (0, 0, ([], [], ["x"]))


def test_parts_of_a_scan_that_jax_has_differentiated():
    loss = lambda w, x: lax.scan(lambda h, y: (jnp.tanh(h @ w + y), h), x[0], x)[0].sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(W, X).jaxpr
    scans = [(e, v) for e in jaxpr.eqns if isinstance(v := view(e), Scan)]
    assert [v.reverse for _, v in scans] == [False, True]
    for eqn, scan in scans:
        consts, carries, stacks = scan.parts(eqn.invars)
        assert all(v.aval.shape[0] == 2 for v in stacks)
        inside = scan.body.jaxpr.invars
        assert [v.aval.shape for v in [*consts, *carries]] == [
            v.aval.shape for v in inside[: scan.fixed]
        ]


def test_parts_of_a_while():
    fun = lambda n, a, c: lax.while_loop(lambda c: c[0] < n, lambda c: c + a, c)
    eqn, loop = the(fun, 3.0, jnp.ones(3), jnp.zeros(3))
    assert (loop.test_consts, loop.body_consts) == (1, 1)
    of_test, of_body, carries = loop.parts(eqn.invars)
    assert [len(p) for p in (of_test, of_body, carries)] == [1, 1, 1]
    assert "lt" in primitives_of(loop.test) and "add" in primitives_of(loop.body)


def test_branches_of_a_cond():
    fun = lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x)
    eqns = jax.make_jaxpr(fun)(1, X).jaxpr.eqns
    (cond,) = (v for e in eqns if isinstance(v := view(e), Cond))
    assert [primitives_of(b) for b in cond.branches] == [["sin"], ["cos"], ["tanh"]]


def test_a_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fun = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    _, found = the(fun, X, W)
    assert isinstance(found, ShardMap)
    assert found.mesh == {"data": 1} and found.over == {"data"}
    assert found.in_specs == (P("data"), P()) and found.out_specs == (P("data"),)


def test_bodies_of_an_equation_without_a_view():
    fun = lambda x: lax.custom_linear_solve(lambda v: v @ W.T, x, lambda mv, b: b)
    eqns = jax.make_jaxpr(fun)(X[0]).jaxpr.eqns
    (solve,) = (e for e in eqns if e.primitive.name == "custom_linear_solve")
    assert view(solve) is None
    assert "dot_general" in [name for body in bodies(solve) for name in primitives_of(body)]


def test_opened_programs_run_on_the_arrays_that_they_closed_over():
    closed = jax.make_jaxpr(lambda x: x @ W + np.ones((2, 3), "float32"))(X)
    jaxpr, arrays = opened(closed)
    assert not jaxpr.constvars and len(jaxpr.invars) == 3
    (out,) = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))(*arrays, X)
    np.testing.assert_allclose(out, X @ W + 1, rtol=1e-6)


def test_only_the_views_read_parameters_that_hold_programs():
    """A change of JAX costs one file: nobody else names what a program is called there."""
    names = {
        "body_jaxpr body_nconsts branches call_jaxpr cond_jaxpr cond_nconsts ft_in ft_out in_specs",
        "jaxpr newly_manual_axes num_carry num_consts out_specs reverse unroll",
    }
    names = {name for line in names for name in line.split()}
    package = Path(jg.__file__).parent
    for file in package.rglob("*.py"):
        if file == package / "_jaxpr" / "views.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert node.slice.value not in names, f"{file.name}:{node.lineno}"


# A JAX that is not known yet.

PARAMS = {"head": jnp.ones((3, 1)), "trunk": W}


def loss(params, x):
    h, _ = lax.scan(lambda h, row: (jnp.tanh(h @ params["trunk"] + row), None), jnp.ones(3), x)
    return jg.tap(h, "h").sum() * params["head"].sum() + params["head"].sum() / 0.0 * 0.0


PUBLIC = {
    "audit": lambda: jg.audit(loss, PARAMS, X, optax.sgd(0.1), wrt="head"),
    "check_grads": lambda: jg.check_grads(loss, PARAMS, X),
    "find_nonfinite": lambda: jg.find_nonfinite(loss, PARAMS, X),
    "fit": lambda: jg.fit(
        lambda p, b: loss(p, b), PARAMS, X, jg.param_groups({"head": optax.sgd(0.1)}),
        batch_size=2, key=jax.random.key(0),
    ),
    "graph": lambda: jg.graph(loss, PARAMS, X),
    "stage": lambda: jg.stage(loss, PARAMS, X, wrt="head"),
    "taps": lambda: jg.value_and_grad(loss, taps=True)(PARAMS, X),
    "trace": lambda: jg.trace(loss, PARAMS, X),
}  # fmt: skip


@pytest.mark.parametrize("call", PUBLIC.values(), ids=list(PUBLIC))
def test_a_form_that_no_view_knows_is_one_sentence(call, monkeypatch):
    def read(params):
        return params["what a later JAX calls it"]

    monkeypatch.setitem(views._READERS, "scan", read)
    with pytest.raises(jg.ProgramError) as info:
        call()
    text = str(info.value)
    assert text.startswith(f"jax {jax.__version__} writes the scan at ")
    assert "test_views.py:" in text
    assert "in a form that this jaxgrad can't read (its parameters are " in text
    assert text.endswith("install one of these, or a newer jaxgrad.")


# What programs close over.

TABLES = {
    "jax": W[0],
    "numpy": np.asarray(W[0]),
    "numpy float64": np.asarray(W[0], "float64"),
    "number": 0.5,
    "numpy scalar": np.float32(0.5),
}


def plain(f):
    return f


def in_scan(f):
    return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0]


def in_while(f):
    return lambda x: lax.fori_loop(0, 2, lambda _, c: f(c), x)


def in_cond(f):
    return lambda x: lax.cond(x.size > 0, f, lambda x: x, x)


def in_map(f):
    return lambda x: lax.map(f, x)


def in_custom(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g


NESTS = {
    "plain": plain,
    "jit": jax.jit,
    "jit in jit": lambda f: jax.jit(lambda x: jax.jit(f)(x)),
    "checkpoint": jax.checkpoint,
    "scan": in_scan,
    "jit in scan": lambda f: in_scan(jax.jit(f)),
    "while": in_while,
    "cond": in_cond,
    "map": in_map,
    "custom": in_custom,
    "scan in jit": lambda f: jax.jit(in_scan(f)),
}


NESTED = [("jax", nest) for nest in NESTS]
NESTED += [(t, n) for t in TABLES if t != "jax" for n in ("jit", "scan", "jit in scan")]


@pytest.mark.parametrize(("table", "nest"), NESTED)
def test_arrays_that_are_closed_over_are_followed(table, nest):
    values = TABLES[table]
    layer = NESTS[nest](
        lambda x: jnp.tanh(x * jnp.broadcast_to(jnp.asarray(values, x.dtype), x.shape))
    )

    def loss(params, x):
        h = layer(x @ params["trunk"])
        return jnp.mean(jg.tap(h, "h") @ params["head"])

    staged = jg.stage(loss, PARAMS, X, wrt="head")
    head, _ = jg.partition(PARAMS, "head")
    value, grads = jax.value_and_grad(staged.loss)(head, staged.prepare(X))
    expected, full = jg.value_and_grad(loss, wrt="head")(PARAMS, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads["head"], full["head"], rtol=1e-6)
    assert not staged.report().refusals
    _, (_, taps) = jg.value_and_grad(loss, taps=True)(PARAMS, X)
    np.testing.assert_allclose(taps["h"], jnp.ones((2, 1)) @ PARAMS["head"].T / 2, rtol=1e-6)
    assert jg.trace(loss, PARAMS, X).depends_on()[-3:] == ["params/head", "params/trunk", "x"]
    assert jg.find_nonfinite(loss, PARAMS, X) is None


@pytest.mark.parametrize("nest", [in_scan, in_while, in_cond], ids=["scan", "while", "cond"])
def test_an_array_of_the_batch_size_in_a_nested_program_is_not_staged(nest):
    def loss(params, x):
        position = np.arange(len(x), dtype="float32")  # closed over by the inner jit
        h = nest(jax.jit(lambda h: h * position[:, None]))(x @ params["trunk"])
        return jnp.mean(h @ params["head"])

    staged = jg.stage(loss, PARAMS, X, wrt="head")
    head, _ = jg.partition(PARAMS, "head")
    rows = jnp.linspace(-1, 1, 12).reshape(4, 3)
    order = jnp.array([3, 1])
    features = staged.prepare(rows)
    value = staged.loss(head, features[order])
    np.testing.assert_allclose(value, loss(PARAMS, rows[order]), rtol=1e-6)


def test_a_jax_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 9, 2))
    monkeypatch.setattr(jax, "__version__", "0.9.2")
    with pytest.raises(
        ImportError, match=r"^jax 0\.9\.2 is installed, and jaxgrad reads .* 0\.10\.2"
    ):
        importlib.reload(jaxgrad._jaxpr)


def test_an_operation_that_jax_spells_out_late_is_run_and_not_staged():
    """`searchsorted` under `vmap` is a `call_hi_primitive` from jax 0.11 on."""

    def loss(params, x):
        edges = jnp.sort(params["trunk"].ravel())
        where = jax.vmap(lambda row: jnp.searchsorted(edges, row))(x)
        return jnp.mean(where.astype(x.dtype) @ params["head"])

    staged = jg.stage(loss, PARAMS, X, wrt="head")
    head, _ = jg.partition(PARAMS, "head")
    value, grads = jax.value_and_grad(staged.loss)(head, staged.prepare(X))
    expected, full = jg.value_and_grad(loss, wrt="head")(PARAMS, X)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads["head"], full["head"], rtol=1e-6)
    assert jg.trace(loss, PARAMS, X).depends_on() == ["params/head", "params/trunk", "x"]
    assert jg.find_nonfinite(loss, PARAMS, X) is None
