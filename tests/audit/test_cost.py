import jax
import jax.numpy as jnp

from jaxgrad._audit.cost import measured

X = jnp.ones((32, 32))
PRODUCT = 2 * 32**3


def test_one_program_is_compiled_once_and_dead_work_is_dropped():
    run, cost = measured(jax.jit(lambda x: (x @ x, x @ x @ x)[0]), X)
    assert isinstance(run, jax.stages.Compiled) and (run(X) == X @ X).all()
    assert PRODUCT <= cost.flops < 1.5 * PRODUCT
    assert cost.nbytes >= 2 * X.nbytes and cost.peak >= 2 * X.nbytes


def test_what_leaves_a_jit_is_computed():
    both = jax.jit(lambda x: (x @ x, x.T @ x))
    run, cost = measured(lambda x: jnp.tanh(both(x)[0]), X)
    assert (run(X) == jnp.tanh(X @ X)).all()
    assert 2 * PRODUCT <= cost.flops < 2.5 * PRODUCT


def test_operations_one_by_one():
    _, cost = measured(lambda x: jax.lax.tanh(jax.lax.neg(x)), X)
    assert cost.flops == 2 * 32**2 and cost.nbytes == 4 * X.nbytes and cost.peak == 2 * X.nbytes
