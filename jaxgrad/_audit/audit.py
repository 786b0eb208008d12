"""What a training step does to each parameter: measured, with reasons, for anyone's code.

Freezing fails silently: decay moves a weight that has no gradient, a mask passes gradients
through, a norm includes frozen gradients, a layer that should learn is never called. An audit
takes the loss and the optimizer as they are, runs a few real steps, and asks of each parameter
what a reviewer would: does it have a gradient, what reads it, what state is stored for it, does it
move, and why. The reasons come from experiments (`ablation.py`), not from the names of
transformations.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad._audit import rules
from jaxgrad._audit.ablation import causes
from jaxgrad._audit.cost import Cost, measured
from jaxgrad._audit.liveness import liveness
from jaxgrad._audit.nnx_state import lost_stats, ties, trained_stats
from jaxgrad._audit.optimizer_state import forgotten, state_bytes, unsaved
from jaxgrad._audit.result import Audit
from jaxgrad._audit.rules import Row
from jaxgrad._audit.train_step import AuditError, Recipe, recipe, split_by_hand
from jaxgrad._jaxpr.graph import trace
from jaxgrad._optim.param_groups import ParamGroups
from jaxgrad._staging.report import Report
from jaxgrad._staging.stage import StageError, stage
from jaxgrad._text import nbytes, spec
from jaxgrad._tree.bitwise import Change, change, wide
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array, is_hole
from jaxgrad._tree.rows import RowsError
from jaxgrad._tree.select import resolve
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.types import Batch, Grads, OptState, Params
from jaxgrad._tree.wrt import Wrt


def audit(
    loss: Callable[..., Any],
    params: Params,
    batch: Batch,
    tx: optax.GradientTransformation,
    wrt: Wrt | None = None,
    *,
    grad: Callable[..., Grads] | None = None,
    step: Callable[..., Any] | None = None,
    opt_state: OptState | None = None,
    previous: OptState | None = None,
    saved: Params | str | PathLike[str] | None = None,
    has_aux: bool = False,
    steps: int = 4,
) -> Audit:
    """Runs a few training steps and reports what happens to each parameter, and why.

    Args:
        loss: `loss(params, batch)`, pure, to a real scalar, or with `has_aux` to
            `(scalar, anything)`.
        params: any pytree; it is left as it is.
        batch: what the loss takes, any pytree of arrays. Staging is predicted only if its examples
            are along axis 0.
        tx: any Optax transformation. As is usual, it is initialised on all parameters and receives
            all gradients, in one jit; if it contains `param_groups`, it receives the trained half.
        wrt: what is *meant* to be trained; see `select`. By default the groups of `tx` if
            `param_groups` made it, else everything.
        grad: `grad(params, batch)`, if gradients are computed in another way:
            `jaxgrad.grad(loss, wrt)` for gradients with holes, `jax.jit(jax.grad(loss))` if a jit
            of their own returns them.
        step: `step(params, opt_state, batch)` to `(params, opt_state, ...)`, if you wrote the step
            yourself. Reasons are then sought in `tx`, and which gradients are computed shows only
            in the cost of the step.
        opt_state: the optimizer's state in a run in progress; by default a new one.
        previous: the optimizer's state before the selection changed; `opt_state` should have kept
            its entries for the parameters that are still trained.
        saved: the checkpoint of a run, or the tree that it saves, which should have all parameters.
        has_aux: see `loss`.
        steps: how many steps to take, all with this batch; more than the optimizer accumulates
            over.

    Returns:
        An `Audit`. It prints as a table with a row for each parameter, the totals and the leaks;
        `.raise_if_leaky()` is for tests.

    Raises:
        SelectionError: `wrt` does not fit `params`.
        AuditError: `steps` is below 1, or what `grad` returns lacks the structure of `params`.
        FileNotFoundError: `saved` is a path without a checkpoint.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxgrad as jg
        >>> def loss(params, batch):
        ...     hidden = jnp.tanh(batch["x"] @ params["trunk"])
        ...     return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)
        >>> params = {"head": jnp.ones((4, 1)), "trunk": jnp.ones((3, 4))}
        >>> batch = {"x": jnp.ones((8, 3)), "y": jnp.zeros((8, 1))}
        >>> frozen = optax.masked(optax.set_to_zero(), {"head": False, "trunk": True})
        >>> leaky = optax.chain(frozen, optax.sgd(0.1), optax.add_decayed_weights(-1e-3))
        >>> jg.audit(loss, params, batch, leaky, wrt="head").leaks[0].kind
        'moves'
        >>> jg.audit(loss, params, batch, leaky, wrt="head")["trunk"].why
        ('decay',)
        >>> jg.audit(loss, params, batch, jg.param_groups({"head": optax.sgd(0.1)})).leaks
        ()

    Source: what DistributedDataParallel's `find_unused_parameters` and a loop over
    `named_parameters` tell a PyTorch user, and what they do not.
    """
    if steps < 1:
        raise AuditError(f"steps={steps}; it must be 1 or more.")
    flat, trained = _trained(params, tx, wrt)

    def value(params: PyTree, batch: PyTree) -> Any:
        return loss(params, batch)[0] if has_aux else loss(params, batch)

    made = recipe(value, params, batch, tx, trained, grad=grad, step=step)
    before = made.arrays
    fresh = made.init(before)
    start = fresh if opt_state is None else opt_state
    grads = jax.jit(made.grads)(before, batch)
    run, spent = measured(made.programs, before, start, batch)
    after, warm = _run(run, before, start, batch, steps)
    found = causes(made, grads, fresh, warm, trained, steps)
    shares, state = _shares(grads), state_bytes(flat, start)
    alive, used = liveness(made, start, batch, grads), _used(made, batch)
    changes = made.everywhere([change(a, b) for a, b in zip(before, after, strict=True)])
    rows = [
        Row(
            path,
            spec(leaf),
            trained[i],
            used[i],
            alive[i],
            shares[i],
            state[i],
            changes[i],
            _why(found.reasons[i], changes[i], bool(step)),
        )
        for i, (path, leaf) in enumerate(zip(flat.paths, flat.leaves, strict=True))
        if is_array(leaf)
    ]
    coupled = [path for path, c in zip(flat.paths, found.coupled, strict=True) if c]
    optimum = _optimum(made, trained, batch)
    leaks = [
        *rules.of_rows(rows, steps, coupled),
        *rules.of_ties(ties(params, flat, trained)),
        *rules.of_statistics(trained_stats(params, flat, trained), lost_stats(made, batch)),
        *rules.of_history(forgotten(flat, previous, start, fresh), unsaved(flat, saved)),
        *rules.of_cost(rows, spent, optimum),
    ]
    return Audit(
        tuple(rows),
        tuple(leaks),
        spent,
        optimum,
        sum(nbytes(x) for x in jax.tree.leaves(start)),
        _staging(made, trained, params, batch),
        steps,
    )


def _trained(
    params: PyTree, tx: optax.GradientTransformation, wrt: Wrt | None
) -> tuple[Flat, list[bool]]:
    """The parameters, and which of them are meant to be trained."""
    if wrt is None:
        wrt = tx.assign(params).wrt if isinstance(tx, ParamGroups) else "**"
    flat = flatten(params)
    chosen = resolve(flat, wrt).flags
    is_float = (
        is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in flat.leaves
    )
    return flat, [c and f for c, f in zip(chosen, is_float, strict=True)]


def _run(
    step: Callable[..., Any], arrays: list[Any], state: PyTree, batch: PyTree, steps: int
) -> tuple[list[Any], Any]:
    # The user's step may donate the buffers that it is passed.
    arrays, state = jax.tree.map(jnp.copy, (arrays, state))
    for _ in range(steps):
        arrays, state = step(arrays, state, batch)
    return arrays, state


def _why(reasons: tuple[str, ...], change: Change | None, own_step: bool) -> tuple[str, ...]:
    if change and not reasons:
        return ("statistics",) if own_step else ("rounding",)
    return () if own_step and not change else reasons  # the step undoes what tx would do


def _used(recipe: Recipe, batch: PyTree) -> list[bool]:
    """For each leaf, whether the loss depends on it."""
    arrays = recipe.arrays
    graph = trace(lambda params: recipe.loss(params, batch), recipe.tree(arrays))
    needed = set(graph.depends_on(0))
    return recipe.everywhere([name in needed for name in graph.inputs[-len(arrays) :]])


def _shares(grads: PyTree) -> list[float]:
    """Each leaf's share of the squared global norm of the gradients."""
    squares = [
        0.0 if is_hole(g) else float((np.abs(wide(g)) ** 2).sum()) for g in flatten(grads).leaves
    ]
    total = sum(squares)
    return [square / total if total else 0.0 for square in squares]


def _optimum(recipe: Recipe, trained: Sequence[bool], batch: PyTree) -> Cost | None:
    """The cost of a step that differentiates only the trained half."""
    split = split_by_hand(recipe, trained)
    try:
        state = split.init(split.arrays)
        return measured(split.programs, split.arrays, state, batch)[1]
    except (TypeError, ValueError, KeyError):  # a transformation that needs the complete tree
        return None


def _staging(
    recipe: Recipe, trained: Sequence[bool], params: PyTree, batch: PyTree
) -> Report | None:
    chosen = {path for path, t in zip(recipe.flat.paths, trained, strict=True) if t}
    try:
        staged = stage(recipe.loss, params, batch, wrt=lambda path, _: path in chosen)
    except (RowsError, StageError, SelectionError):  # no rows in the batch; tied parameters
        return None
    return staged.report()
