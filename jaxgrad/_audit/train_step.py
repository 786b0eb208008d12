"""Normalises a training step, so that an audit can rerun its parts as functions of arrays.

An audit must not change what it measures. A plain Optax chain is initialised on all parameters
and receives all gradients, as in most training loops; one that contains `param_groups` receives
gradients with holes, and only the parameters that have one. If the user computes gradients or
takes steps in another way, the user's functions run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxgrad._optim.apply_updates import apply_updates
from jaxgrad._optim.param_groups import holds_groups
from jaxgrad._tree.flat import (
    Flat,
    PyTree,
    check_same_structure,
    flatten,
    halves,
    is_array,
    is_hole,
)
from jaxgrad._tree.merge import merge


class AuditError(ValueError):
    """Something that can't be audited: the message names what was passed and what is expected."""

    __module__ = "jaxgrad"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How parameters are trained. Its methods take them as a list of the arrays of their tree.

    Attributes:
        flat: the tree of the parameters.
        loss: `loss(params, batch)` to a scalar.
        tx: the transformation.
        differentiate: `grad(params, batch)` to a tree of gradients, possibly with holes.
        own_step: the user's own step, if there is one.
        graded: for each leaf of `flat`, whether there is a gradient for it.
        split: whether there are holes for parameters that could have a gradient.
    """

    flat: Flat
    loss: Callable[..., Any]
    tx: optax.GradientTransformation
    differentiate: Callable[..., PyTree]
    own_step: Callable[..., Any] | None
    graded: tuple[bool, ...]
    split: bool

    @property
    def arrays(self) -> list[jax.Array]:
        """The parameters."""
        return [jnp.asarray(x) for x in self.flat.leaves if is_array(x)]

    def tree(self, arrays: Sequence[Any]) -> PyTree:
        """The user's tree, rebuilt, so that nothing else sees what a loss writes into it."""
        values = iter(arrays)
        leaves = [next(values) if is_array(x) else x for x in self.flat.leaves]
        return self.flat.treedef.unflatten(leaves)

    def everywhere(self, values: Sequence[Any]) -> list[Any]:
        """Values of the arrays, spread over the leaves of `flat`: None for other leaves."""
        given = iter(values)
        return [next(given) if is_array(x) else None for x in self.flat.leaves]

    def array_leaves(self, tree: PyTree) -> list[Any]:
        """The leaves of such a tree, holes included, where the parameters have arrays."""
        found = flatten(tree).leaves
        return [x for x, leaf in zip(found, self.flat.leaves, strict=True) if is_array(leaf)]

    def held(self, arrays: Sequence[Any]) -> PyTree:
        """The half of the parameters that the transformation receives."""
        return halves(flatten(self.tree(arrays)), self.graded)[0]

    def init(self, arrays: Sequence[Any]) -> Any:
        """A new state of the transformation."""
        return self.tx.init(self.held(arrays))

    def grads(self, arrays: Sequence[Any], batch: PyTree) -> PyTree:
        """The gradients as the transformation receives them."""
        grads = self.differentiate(self.tree(arrays), batch)
        return halves(flatten(grads), self.graded)[0]

    def update(self, grads: PyTree, state: PyTree, arrays: Sequence[Any]) -> tuple[PyTree, Any]:
        """The updates and the new state."""
        return self.tx.update(grads, state, self.held(arrays))

    def step(
        self,
        arrays: Sequence[Any],
        state: PyTree,
        batch: PyTree,
        observe: Callable[[PyTree], PyTree] = lambda grads: grads,
    ) -> tuple[list[Any], Any]:
        """One step: the new parameters and the new state.

        Args:
            arrays: the parameters.
            state: the state of the transformation.
            batch: what the loss takes.
            observe: an identity that the gradients pass through.
        """
        if self.own_step:
            params, state, *_ = self.own_step(self.tree(arrays), state, batch)
            return self.array_leaves(params), state
        updates, state = self.update(observe(self.grads(arrays, batch)), state, arrays)
        held, rest = halves(flatten(self.tree(arrays)), self.graded)
        apply = apply_updates if self.split else optax.apply_updates
        return self.array_leaves(merge(apply(held, updates), rest)), state

    @property
    def programs(self) -> Callable[..., Any]:
        """The step as it runs: one jitted program, or several if the user's code is split so."""
        if self.own_step:
            return self.step
        if not self.leaves_its_jit:
            return jax.jit(self.step)
        apart = jax.jit(lambda arrays, state, grads: self._given(grads).step(arrays, state, None))
        return lambda arrays, state, batch: apart(arrays, state, self.grads(arrays, batch))

    def _given(self, grads: PyTree) -> "Recipe":
        return dataclasses.replace(self, differentiate=lambda params, batch: grads)

    @property
    def leaves_its_jit(self) -> bool:
        """Whether gradients come out of a jit of their own, which computes all that it returns."""
        return isinstance(self.differentiate, jax.stages.Wrapped)


def recipe(
    loss: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    tx: optax.GradientTransformation,
    trained: Sequence[bool],
    *,
    grad: Callable[..., PyTree] | None = None,
    step: Callable[..., Any] | None = None,
) -> Recipe:
    """Returns the recipe of a training step.

    Args:
        loss: `loss(params, batch)` to a scalar.
        params: any pytree.
        batch: what the loss takes.
        tx: any Optax transformation.
        trained: which leaves are meant to be trained.
        grad: how gradients are computed, if not in the usual way.
        step: how a step is taken, if not in the usual way.
    """
    flat = flatten(params)
    floats = tuple(is_array(x) and _is_inexact(x) for x in flat.leaves)
    if grad is None:
        holes = holds_groups(jax.eval_shape(tx.init, halves(flat, floats)[0]))
        graded = tuple(f and (t or not holes) for f, t in zip(floats, trained, strict=True))
        return Recipe(flat, loss, tx, _gradient(loss, graded), step, graded, graded != floats)
    # Abstract arrays would usually do, but a user's `grad` may inspect its arguments.
    found = flatten(grad(params, batch))
    check_same_structure(flat, found, "params", "the result of grad", AuditError)
    graded = tuple(not is_hole(g) and f for g, f in zip(found.leaves, floats, strict=True))
    return Recipe(flat, loss, tx, grad, step, graded, graded != floats)


def split_by_hand(recipe: Recipe, trained: Sequence[bool]) -> Recipe:
    """The same transformation, passed only the trained parameters and their gradients."""
    graded = tuple(
        t and is_array(x) and _is_inexact(x)
        for t, x in zip(trained, recipe.flat.leaves, strict=True)
    )
    return dataclasses.replace(
        recipe,
        differentiate=_gradient(recipe.loss, graded),
        own_step=None,
        graded=graded,
        split=True,
    )


def _gradient(loss: Callable[..., Any], graded: Sequence[bool]) -> Callable[..., PyTree]:
    def grad(params: PyTree, batch: PyTree) -> PyTree:
        selected, rest = halves(flatten(params), graded)
        return jax.grad(lambda s: loss(merge(s, rest), batch))(selected)

    return grad


def _is_inexact(x: ArrayLike) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))
