import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from jaxgrad._jaxpr.dataflow import between
from jaxgrad._jaxpr.inline import inline
from jaxgrad._jaxpr.views import Scan, view


def names(jaxpr):
    return [e.primitive.name for e in jaxpr.eqns]


def flat(fun, varying, *args):
    program = inline(jax.make_jaxpr(fun)(*args), varying)
    expected = jax.tree.leaves(fun(*args))
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(program.jaxpr, []))
    for a, b in zip(run(*program.consts, *args), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    return program.jaxpr


X = jnp.linspace(0.1, 1, 6).reshape(2, 3)


def test_nested_jits_twice_over():
    inner = jax.jit(lambda x: jnp.sin(x) + 1)
    jaxpr = flat(jax.jit(lambda x: inner(inner(x))), [True], X)
    assert names(jaxpr) == ["sin", "add", "sin", "add"]


def test_dead_equations_are_dropped_and_effects_kept():
    def fun(x):
        jnp.cos(x)
        jax.debug.callback(lambda _: None, x * 2)
        return x + 1

    assert names(flat(fun, [True], X)) == ["mul", "debug_callback", "add"]


@pytest.mark.parametrize("varies", [True, False])
def test_custom_derivatives_stay_whole_where_differentiated(varies):
    jaxpr = flat(jax.nn.relu, [varies], X)
    assert names(jaxpr) == (["custom_jvp_call"] if varies else ["max"])


def test_frozen_equations_leave_a_checkpoint():
    @jax.checkpoint
    def block(frozen, trained, x):
        h = jnp.sin(x * frozen)
        return h, jnp.cos(h * trained), x

    args = jnp.ones((2, 3)), jnp.ones((2, 3)), X
    jaxpr = flat(block, [False, True, False], *args)
    assert names(jaxpr) == ["mul", "sin", "remat2"]
    assert names(view(jaxpr.eqns[-1]).body.jaxpr) == ["mul", "cos"]
    grads = jax.grad(lambda *a: jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, []))(*a)[1].sum(), 1)
    expected = jax.grad(lambda *a: block(*a)[1].sum(), 1)
    np.testing.assert_allclose(grads(*args), expected(*args), rtol=1e-6)


def test_scopes_of_nested_calls_are_joined():
    @jax.jit
    def inner(x):
        with jax.named_scope("inner"):
            return jnp.sin(x)

    def outer(x):
        with jax.named_scope("outer"):
            return inner(x)

    (eqn,) = flat(outer, [True], X).eqns
    assert str(eqn.source_info.name_stack) == "outer/inner"


def scanned(first, last, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, jnp.concatenate([first, last]))


def test_a_scan_splits_where_its_layers_turn_trainable():
    draw = np.random.default_rng(0).normal
    args = [jnp.asarray(draw(size=s), "float32") for s in ((3, 3, 3), (2, 3, 3))]
    jaxpr = flat(scanned, [False, True, False], *args, X)
    assert [v.length for e in jaxpr.eqns if isinstance(v := view(e), Scan)] == [3, 2]


@pytest.mark.parametrize(
    "varying", [[True, True, False], [True, False, False], [False, True, True]]
)
def test_a_scan_stays_whole_otherwise(varying):
    args = jnp.ones((3, 3, 3)), jnp.ones((2, 3, 3)), X
    jaxpr = flat(scanned, varying, *args)
    assert names(jaxpr).count("scan") == 1


def test_between_takes_what_leads_from_inputs_to_outputs():
    jaxpr = flat(lambda x: jnp.cos(jnp.sin(x) * 2) + 1, [True], X)
    middle = between(jaxpr, jaxpr.eqns[0].outvars, jaxpr.eqns[2].outvars)
    assert names(middle) == ["mul", "cos"]
