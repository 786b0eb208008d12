"""Freezing in the optimizer: one transformation per group of parameters, none for the rest.

Optax freezes by adding to a chain (`masked`, `set_to_zero`, `freeze`), and what comes after
or beside the addition can still move a frozen leaf, store state for it, or count it in a norm.
Here each transformation receives a tree in which the leaves of the others are holes. It can't
decay, clip or remember what it doesn't see.

A hole in the gradients gives a hole in the updates. A frozen leaf that has a gradient anyway (from
`jax.grad` over everything) gets an update of negative zero, because `-0.0 + 0.0` is `0.0`, but
`-0.0 + -0.0` is `-0.0`. `optax.apply_updates` then preserves every normal value; `apply_updates`
here also preserves subnormals, which XLA's addition on CPU flushes to zero. A caller that passes
all parameters to `init` and `update`, such as Flax's `TrainState`, adds updates to all of them:
there a hole in the gradients gives negative zero too.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxgrad._optim.apply_updates import UpdateError
from jaxgrad._optim.extra_args import with_extra_args
from jaxgrad._optim.holes import refusing_holes
from jaxgrad._text import count, listed, nbytes, numel, size, spec
from jaxgrad._tree.flat import (
    Flat,
    PyTree,
    abstract,
    check_same_structure,
    flatten,
    halves,
    is_array,
    is_hole,
    is_key,
    paths,
)
from jaxgrad._tree.merge import merge
from jaxgrad._tree.select import refuse_tied
from jaxgrad._tree.selection import Selection, SelectionError
from jaxgrad._tree.wrt import Wrt, match

Groups: TypeAlias = (
    Mapping[str, optax.GradientTransformation] | Iterable[tuple[Wrt, optax.GradientTransformation]]
)


class ParamGroupsState(NamedTuple):
    """The states of the groups' transformations, in the order of the groups.

    Attributes:
        groups: the states.
        leaves: for each group, and last for what no group takes, the paths of the leaves that
            `init` was given. The values are empty tuples: structure alone, without an array.
    """

    groups: tuple[Any, ...]
    leaves: tuple[dict[str, tuple[()]], ...]


def holds_groups(opt_state: PyTree) -> bool:
    """Whether an optimizer's state contains the state of `param_groups`, at any depth."""

    def is_groups(node: object) -> bool:
        return isinstance(node, ParamGroupsState)

    return any(map(is_groups, jax.tree.leaves(opt_state, is_leaf=is_groups)))


@dataclasses.dataclass(frozen=True, repr=False)
class Assignment:
    """Which group takes which leaves; see `ParamGroups.assign`.

    Attributes:
        groups: the leaves of each group by path, by the name of the group.
        frozen: the leaves that no group takes, by path.
        wrt: the leaves that some group takes, as a `Selection`.
    """

    groups: Mapping[str, Mapping[str, Any]]
    frozen: Mapping[str, Any]
    wrt: Selection

    def __repr__(self) -> str:
        lines = []
        for name, leaves in [*self.groups.items(), ("frozen", self.frozen)]:
            width = max(map(len, leaves), default=0)
            n = sum(map(numel, leaves.values()))
            total = size(sum(map(nbytes, leaves.values())))
            lines.append(f"{name}: {count([*leaves], 'leaf', verb=False)}, {n:,} elements, {total}")
            lines += [f"  {path:{width}}  {spec(leaf)}" for path, leaf in leaves.items()]
        return "\n".join(lines)


class ParamGroups(optax.GradientTransformationExtraArgs):
    """An Optax transformation that knows its groups; made by `param_groups`."""

    groups: tuple[tuple[Wrt, optax.GradientTransformationExtraArgs], ...]

    def __new__(cls, groups: Groups) -> "ParamGroups":
        """Makes the transformation; see `param_groups`."""
        pairs = groups.items() if isinstance(groups, Mapping) else groups
        resolved = tuple((wrt, with_extra_args(tx)) for wrt, tx in pairs)
        if not resolved:
            raise SelectionError(
                "param_groups needs at least one group: without one, everything would be frozen."
            )

        def init(params: PyTree) -> ParamGroupsState:
            refuse_tied(params)
            flat = flatten(params)
            owners = _owners(flat, resolved)
            names, states = _names(resolved), []
            for i, (_, tx) in enumerate(resolved):
                part = _part(flat, owners, i)
                with refusing_holes(tx, flatten(part), f"the group {names[i]!r}"):
                    states.append(tx.init(part))
            return ParamGroupsState(tuple(states), _leaves_of(flat, owners, len(resolved)))

        def update(
            updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: object
        ) -> tuple[PyTree, Any]:
            return _update(resolved, updates, state, params, extra)

        self = super().__new__(cls, init, update)  # pyright: ignore[reportArgumentType]
        self.groups = resolved
        return self

    def __repr__(self) -> str:
        return f"<param_groups {', '.join(_names(self.groups))}; everything else frozen>"

    def assign(self, params: PyTree) -> Assignment:
        """Returns which group takes which leaf; its repr lists them, with shapes and bytes.

        Args:
            params: the parameters, or the trainable half of them.

        Raises:
            SelectionError: see `param_groups`.

        Example:
            >>> import jax.numpy as jnp, optax, jaxgrad as jg
            >>> params = {"head": jnp.ones((2, 3)), "trunk": [jnp.ones(4), jnp.ones(5)]}
            >>> jg.param_groups({"head": optax.adam(1e-3)}).assign(params)
            head: 1 leaf, 6 elements, 24 B
              head  float32[2,3]
            frozen: 2 leaves, 9 elements, 36 B
              trunk/0  float32[4]
              trunk/1  float32[5]
        """
        refuse_tied(params)
        flat = flatten(params)
        owners = _owners(flat, self.groups)
        taken: list[dict[str, Any]] = [{} for _ in (*self.groups, "frozen")]
        for path, leaf, owner in zip(flat.paths, flat.leaves, owners, strict=True):
            if is_array(leaf):
                taken[-1 if owner is None else owner][path] = leaf
        mask = [o is not None for o in owners]
        return Assignment(
            dict(zip(_names(self.groups), taken, strict=False)),
            taken[-1],
            Selection(abstract(flat), tuple(mask)),
        )


def param_groups(groups: Groups) -> ParamGroups:
    """Returns an Optax transformation with one transformation per group, everything else frozen.

    Args:
        groups: a transformation for each `wrt` (see `select`), as a dict by glob or as pairs.
            They are tried in order, and the first that matches takes the leaf.

    Returns:
        An `optax.GradientTransformationExtraArgs`. `init` takes the trainable half of the
        parameters, or all of them; `update` takes gradients with holes (`jaxgrad.grad`), or for
        all leaves (`jax.grad`), and returns updates of the same structure. A frozen leaf has no
        state and no share in a norm, and stays bit-identical: its update is a hole if its
        gradient is one, and negative zero otherwise. If `init` and `update` are both passed all
        parameters, as by Flax's `TrainState`, it is negative zero for a hole too. Extra arguments
        go to every group; of those that Optax names, `grad` holds the group's leaves and
        `value_fn` is a function of them.
        `.assign(params)` lists which group takes what.

        To clip by the norm over several groups, nest: `param_groups({"!trunk/**":
        optax.chain(optax.clip_by_global_norm(1.0), param_groups({...}))})`.

    Raises:
        SelectionError: there is no group; and on `init` or `update`, a pattern matches no leaf,
            a predicate selects no leaf of a tree without holes, a group matches only leaves
            that earlier groups take, or an NNX parameter is tied (see `select`).
        UpdateError: on `update`, gradients, parameters and state differ in structure; or a
            transformation can't take a tree with holes.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxgrad as jg
        >>> params = {"head": jnp.ones(2), "trunk": jnp.ones(3)}
        >>> tx = jg.param_groups({"head": optax.sgd(0.5, momentum=0.9)})
        >>> trainable, frozen = jg.partition(params, "head")
        >>> state = tx.init(trainable)
        >>> grads = jg.grad(lambda p: jnp.sum(p["head"]) * jnp.sum(p["trunk"]), "head")(params)
        >>> updates, state = tx.update(grads, state, trainable)
        >>> print(updates["head"], updates["trunk"])
        [-1.5 -1.5] None
        >>> params = jg.apply_updates(params, updates)
        >>> print(params["head"], params["trunk"])
        [-0.5 -0.5] [1. 1. 1.]

    Source: the parameter groups of `torch.optim.Optimizer`, and Optax's `partition`, which
    needs a label for every leaf.
    """
    return ParamGroups(groups)


def _update(
    groups: tuple[tuple[Wrt, optax.GradientTransformationExtraArgs], ...],
    updates: PyTree,
    state: ParamGroupsState,
    params: PyTree | None,
    extra: dict[str, Any],
) -> tuple[PyTree, ParamGroupsState]:
    given = flatten(updates)
    known = given
    if params is not None:
        known = flatten(params)
        check_same_structure(known, given, "params", "updates", UpdateError)
    owners = _owners(known, groups)
    owners = [None if is_hole(u) else owner for u, owner in zip(given.leaves, owners, strict=True)]
    leaves = [
        update if is_hole(update) or owner is not None else _still(update)
        for update, owner in zip(given.leaves, owners, strict=True)
    ]
    if params is not None:
        at_init = frozenset[str]().union(*state.leaves)
        leaves = [
            _filled(update, param) if is_hole(update) and path in at_init else update
            for path, update, param in zip(known.paths, leaves, known.leaves, strict=True)
        ]
    states = []
    for i, ((_, tx), group_state) in enumerate(zip(groups, state.groups, strict=True)):
        if i not in owners:
            states.append(group_state)
            continue
        part = None if params is None else _part(known, owners, i)
        if part is not None:
            _refuse_holes(known, owners, i)
        grads, own = _part(given, owners, i), _extra_of(extra, known, owners, i)
        with refusing_holes(tx, flatten(grads), f"the group {_names(groups)[i]!r}"):
            new, group_state = _call(tx, grads, group_state, part, own)
        states.append(group_state)
        leaves = [
            n if o == i else u for n, o, u in zip(flatten(new).leaves, owners, leaves, strict=True)
        ]
    return given.treedef.unflatten(leaves), ParamGroupsState(tuple(states), state.leaves)


def _call(
    tx: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    state: PyTree,
    params: PyTree | None,
    extra: dict[str, Any],
) -> tuple[PyTree, Any]:
    try:
        new, after = tx.update(updates, state, params, **extra)
    except (TypeError, ValueError) as e:
        # Optax reports a state made for other leaves as a mismatch deep in some tree map.
        _refuse_other_leaves(tx, updates if params is None else params, state, e)
        raise
    if jax.tree.structure(after) != jax.tree.structure(state):
        # Other tree maps in Optax read a hole as a leaf, and silently drop that leaf's momentum.
        _refuse_other_leaves(tx, updates if params is None else params, state, None)
    return new, after


def _extra_of(
    extra: dict[str, Any], params: Flat, owners: list[int | None], group: int
) -> dict[str, Any]:
    """The extra arguments of a group: what is about all leaves, for its own."""
    own = dict(extra)
    if "grad" in extra:
        own["grad"] = _part(flatten(extra["grad"]), owners, group)
    if "value_fn" in extra:
        _, others = halves(params, [owner == group for owner in owners])
        own["value_fn"] = lambda part: extra["value_fn"](merge(part, others))
    return own


def _refuse_other_leaves(
    tx: optax.GradientTransformation, given: PyTree, state: PyTree, cause: Exception | None
) -> None:
    needed, had = (set(paths(s)) for s in (jax.eval_shape(tx.init, given), state))
    if needed != had:
        lacks, excess = (sorted(map(repr, s)) for s in (needed - had, had - needed))
        raise UpdateError(
            f"the state was made for other leaves than those that have gradients: missing "
            f"{listed(lacks) or 'none'}, unexpected {listed(excess) or 'none'}. Make it with "
            "tx.init(trainable), from `trainable, frozen = jaxgrad.partition(params, wrt)`."
        ) from cause


def _owners(flat: Flat, groups: Iterable[tuple[Wrt, Any]]) -> list[int | None]:
    """The index of the group that takes each position, `None` if it is frozen."""
    owners: list[int | None] = [None] * len(flat.paths)
    groups = tuple(groups)
    for i, (wrt, _) in enumerate(groups):
        hits = match(flat, wrt)
        if not any(hits) and not any(map(is_hole, flat.leaves)):
            raise SelectionError(
                f"the group {_names(groups)[i]!r} matches no leaf, so its transformation would "
                f"train nothing. The tree's paths: {listed(map(repr, flat.paths))}."
            )
        free = [hit and owner is None for hit, owner in zip(hits, owners, strict=True)]
        if any(hits) and not any(free):
            names = _names(groups)
            first = next(o for hit, o in zip(hits, owners, strict=True) if hit and o is not None)
            raise SelectionError(
                f"the group {names[i]!r} gets no leaf: earlier groups take all that it matches. "
                f"The first match wins, so put it before {names[first]!r}."
            )
        owners = [i if f else owner for f, owner in zip(free, owners, strict=True)]
    return owners


def _part(flat: Flat, owners: list[int | None], group: int) -> PyTree:
    return halves(flat, [owner == group for owner in owners])[0]


def _refuse_holes(params: Flat, owners: list[int | None], group: int) -> None:
    holes = [
        f"'{path}'"
        for path, leaf, owner in zip(params.paths, params.leaves, owners, strict=True)
        if owner == group and is_hole(leaf)
    ]
    if holes:
        raise UpdateError(
            f"there are gradients for {listed(holes)} but no parameters. Pass as params= the tree "
            "that was differentiated, or its trainable half."
        )


def _names(groups: Iterable[tuple[Wrt, Any]]) -> list[str]:
    return [wrt if isinstance(wrt, str) else _name(wrt, i) for i, (wrt, _) in enumerate(groups)]


def _name(wrt: Wrt, i: int) -> str:
    if isinstance(wrt, list | tuple):
        return str(list(wrt))
    return f"group {i}, by {'a predicate' if callable(wrt) else 'a tree of booleans'}"


def _still(update: Any) -> Any:
    """The update that changes nothing, not even the sign of a zero."""
    if jnp.issubdtype(jnp.result_type(update), jnp.inexact):
        return -jnp.zeros_like(update)
    return update if update.dtype == jax.dtypes.float0 else jnp.zeros_like(update)


def _filled(update: Any, param: Any) -> Any:
    """The update that changes nothing, in place of a hole; a hole if the parameter is one too."""
    return _still(jnp.asarray(param)) if is_array(param) and not is_key(param) else update


def _leaves_of(
    flat: Flat, owners: list[int | None], groups: int
) -> tuple[dict[str, tuple[()]], ...]:
    """The paths of the leaves of each group, and of those of none."""
    found: list[dict[str, tuple[()]]] = [{} for _ in range(groups + 1)]
    for path, leaf, owner in zip(flat.paths, flat.leaves, owners, strict=True):
        if is_array(leaf):
            found[-1 if owner is None else owner][path] = ()
    return tuple(found)
