"""Frozen is free: finds the frozen part of a loss in its jaxpr and computes it once.

A fine-tune computes the same frozen layers for the same examples in every epoch. The jaxpr of
the loss shows which values depend on frozen parameters and one example alone. These are computed
once and kept as *features*, and the loss continues from them. `stage` reads a pure function, of
whatever library, and needs neither knowledge of the model nor a change to it; the staged loss has
the same value and the same gradients.

Staging is proven and then checked. `batch_axis.py` follows through the equations that a value is a
function of its own example (a primitive without a rule is not staged). Before anything is
prepared, the frozen part runs on the same rows at other positions, among other rows, and must
return the same values.
"""

import dataclasses
import functools
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.sharding import NamedSharding

from jaxgrad._jaxpr.source import aval
from jaxgrad._staging import precompute
from jaxgrad._staging.encoding import ENCODINGS, decode, is_encoded
from jaxgrad._staging.features import Features
from jaxgrad._staging.precompute import StageError
from jaxgrad._staging.report import Report, report
from jaxgrad._staging.split import Split, split
from jaxgrad._staging.traced_loss import TracedLoss
from jaxgrad._staging.two_traces import Misaligned
from jaxgrad._tree.flat import PyTree, check_same_structure, flatten
from jaxgrad._tree.rows import rows_of
from jaxgrad._tree.select import select
from jaxgrad._tree.types import Batch, Params
from jaxgrad._tree.wrt import Wrt


def stage(
    loss: Callable[..., PyTree],
    params: Params,
    batch: Batch,
    wrt: Wrt,
    *,
    vary: Sequence[PyTree] = (),
) -> "Staged":
    """Splits a loss into a frozen part, which runs once, and the rest, which runs in each step.

    A staged loss can be staged again, to unfreeze layer by layer: stage the widest selection
    first, then `stage(staged.loss, trainable, features[:rows], wrt=narrower)` and prepare
    from the features. No frozen layer runs more than once per example, over all phases.

    Args:
        loss: a pure function `loss(params, batch, *vary)` that returns a scalar, or any tree of
            arrays (a scalar and auxiliary values).
        params: any tree of arrays. Staging uses the values of the arrays that `wrt` does not
            select, and only the shapes of the others.
        batch: a tree of arrays (or `jax.ShapeDtypeStruct`) with the examples along axis 0. Datasets
            are prepared in chunks of this many rows; a staged loss takes batches of any size.
        wrt: what to train, as in `jaxgrad.select`.
        vary: examples of the other arguments of `loss`, which change from step to step: a PRNG
            key, a step counter. Whatever depends on them is not staged.

    Returns:
        The staged loss. Print it to see what runs once, what each step takes, and why.

    Raises:
        SelectionError: `wrt` does not fit `params`.
        RowsError: the arrays of `batch` differ in their number of rows, or have none.
        StageError: a shape or a branch of the loss depends on values.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, batch):
        ...     hidden = jnp.tanh(batch["x"] @ params["trunk"])
        ...     return jnp.mean((hidden @ params["head"] - batch["y"]) ** 2)
        >>> params = {"head": jnp.ones((4, 1)), "trunk": jnp.ones((100, 4))}
        >>> dataset = {"x": jnp.ones((64, 100)), "y": jnp.zeros((64, 1))}
        >>> batch = jax.tree.map(lambda a: a[:16], dataset)
        >>> staged = jg.stage(loss, params, batch, wrt="head")
        >>> features = staged.prepare(dataset)
        >>> features.values[0].shape  # one row per example: the input of the head
        (64, 4)
        >>> head, _ = jg.partition(params, "head")
        >>> bool(jnp.allclose(staged.loss(head, features[:16]), loss(params, batch)))
        True

    Source: what a PyTorch user writes by hand as `with torch.no_grad(): features = backbone(x)`.
    """
    selection = select(params, wrt)
    rows = rows_of(batch, "the batch", "Pass what does not belong to an example by `vary`.")
    source = TracedLoss(loss, selection.named(params), selection.flags, _bare(batch), vary)
    try:
        # With one row, a sum over the batch looks like no sum at all.
        plan = _Plan(source, split(source, max(rows, 2)))
    except _NEEDS_VALUES as error:
        raise StageError(_needs_values(error)) from error
    return Staged(plan.fold(), plan)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["constants"], meta_fields=["_plan"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class Staged:
    """A loss in two parts; made by `jaxgrad.stage`.

    A pytree whose leaves are the frozen values that the steps need: pass it to a jitted function as
    an argument, and they are not compiled into it.

    Attributes:
        constants: frozen parameters, and values of them, that each step needs.
    """

    constants: tuple[jax.Array, ...]
    _plan: "_Plan"

    def __repr__(self) -> str:
        return f"Staged: {self.report()}"

    def report(self) -> Report:
        """Returns what runs once, what runs in every step, and what was refused and why."""
        return self._plan.report

    def prepare(
        self,
        dataset: PyTree,
        where: str | os.PathLike[str] = "auto",
        *,
        budget_bytes: int | None = None,
        features_dtype: str | None = None,
        progress: bool = True,
        sharding: NamedSharding | None = None,
    ) -> Features:
        """Runs the frozen part over a dataset, once.

        Args:
            dataset: a tree like `batch`, with all examples along axis 0.
            where: "device"; "host", in NumPy arrays; a folder, in files that are written once and
                found again by everything they depend on (frozen parameters, data, computation,
                versions), even after a killed preparation; "auto": on the device within the
                budget, else in host memory if that is separate.
            budget_bytes: the most memory that features may take; by default half of what is free.
            features_dtype: store floating point features as "bfloat16", or as "int8" with a scale
                per example; `features.stats.error` is the relative error.
            progress: whether to show a progress bar on a terminal.
            sharding: how to lay out the rows of a chunk on the mesh of the parameters, to use all
                its devices; `where` is then "host" or a folder.

        Returns:
            The features; `features[rows]` is a batch of them. They include, uncopied, the parts of
            the batch that the steps need (labels).

        Raises:
            StageError: the dataset does not match the batch, the features do not fit in memory, or
                an example's features depend on other examples.
        """
        if features_dtype not in ENCODINGS:
            raise StageError(
                f"features_dtype is {features_dtype!r}; expected one of "
                f"{', '.join(map(repr, ENCODINGS))}."
            )
        plan = self._plan
        leaves, total = plan.check_dataset(dataset)
        cut = plan.at(min(plan.split.rows, total))
        frozen = precompute.Frozen(cut, plan.frozen_values(cut), leaves, features_dtype, sharding)
        values, stats = precompute.prepare(frozen, total, where, budget_bytes, progress)
        stored, given = iter(values), dict(zip(cut.program.batch, leaves, strict=True))
        ordered: list[Any] = []
        for var in cut.crossing:
            if var in given:
                leaf = given[var]
                ordered.append(jnp.asarray(leaf) if stats.where == "device" else leaf)
            else:
                ordered += [next(stored) for _ in range(_arrays(var, features_dtype))]
        return Features(tuple(ordered), features_dtype, stats)

    def loss(self, trainable: PyTree, features: Features, *vary: PyTree) -> PyTree:
        """Returns the loss of a batch of features, equal to `loss(params, batch, *vary)`.

        Works under `jit`, `grad`, `vmap` and `scan`.

        Args:
            trainable: the selected half of the parameters, `jaxgrad.partition(params, wrt)[0]`.
            features: a batch, `features[rows]`, of any number of rows.
            *vary: the other arguments of the loss.

        Returns:
            The result of the loss.

        Raises:
            StageError: `trainable` is not that half, or the loss computes something else for
                this number of rows.
        """
        plan = self._plan
        leaves = plan.check_trainable(trainable)
        cut = plan.at(len(features) if plan.split.crossing else plan.split.rows)
        stored = iter(features.values)
        inputs = []
        for var in cut.crossing:
            given = var in cut.program.batch
            x = decode(stored, aval(var).dtype, None if given else features.encoding)
            inputs.append(jnp.asarray(x) if given else cut.place(var).restored(x))
        vary_leaves, vary_tree = jax.tree.flatten(vary)
        if vary_tree != plan.source.vary_tree:
            raise StageError(
                f"the loss was staged with vary={plan.source.vary_tree} and is called with "
                f"{vary_tree}. Both must have one structure."
            )
        outs = plan.step(cut)(*leaves, *self.constants, *inputs, *vary_leaves)
        return cut.program.out_tree.unflatten(outs)


class _Plan:
    """A split loss at each batch size in use. Compared by identity."""

    def __init__(self, source: TracedLoss, cut: Split) -> None:
        self.source, self.split = source, cut
        names = jax.tree_util.tree_flatten_with_path(source.batch_tree.unflatten(source.batch))[0]
        self.names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in names]
        self._at = {cut.rows: cut}
        self._steps: dict[int, Callable[..., Any]] = {}

    @functools.cached_property
    def report(self) -> Report:
        named = [repr(n) if n else "array" for n in self.names]
        return report(self.split, dict(zip(self.split.program.batch, named, strict=True)))

    def at(self, rows: int) -> Split:
        if rows not in self._at:
            try:
                self._at[rows] = self.split.at(self.source.trace(rows), rows)
            except Misaligned as error:
                raise StageError(
                    f"the loss was staged with batches of {self.split.rows} rows, and for {rows} "
                    f"rows {error}. Use one batch size, or a loss that computes the same "
                    "at all sizes."
                ) from None
        return self._at[rows]

    def step(self, cut: Split) -> Callable[..., Any]:
        if cut.rows not in self._steps:
            self._steps[cut.rows] = jex.jaxpr_as_fun(jex.ClosedJaxpr(cut.step(), []))
        return self._steps[cut.rows]

    def frozen_values(self, cut: Split) -> list[Any]:
        params = self.source.params.leaves
        return [*cut.program.closed_over, *(params[i] for i in self.source.frozen)]

    def fold(self) -> tuple[jax.Array, ...]:
        """The constants: computed once, or a parameter itself, uncopied."""
        cut = self.split
        given = dict(zip(cut.program.frozen, self.frozen_values(cut), strict=True))
        made = dataclasses.replace(cut, constants=[v for v in cut.constants if v not in given])
        run = jax.jit(jex.jaxpr_as_fun(jex.ClosedJaxpr(made.fold(), [])))
        computed = iter(run(*given.values()) if made.constants else ())
        return tuple(jnp.asarray(given[v]) if v in given else next(computed) for v in cut.constants)

    def check_trainable(self, trainable: PyTree) -> list[Any]:
        source = self.source
        flat = flatten(trainable)
        check_same_structure(
            source.params,
            flat,
            "the tree that was staged",
            "trainable",
            StageError,
        )
        leaves = []
        for i in source.trained:
            leaf, spec, path = flat.leaves[i], source.shapes[i], flat.paths[i]
            if leaf is None:
                raise StageError(
                    f"trainable has a hole at '{path}', which is trained. Pass the selected half "
                    "of the parameters: `jaxgrad.partition(params, wrt)[0]`."
                )
            if np.shape(leaf) != spec.shape or jnp.result_type(leaf) != spec.dtype:
                raise StageError(
                    f"'{path}' is {jnp.result_type(leaf)}{list(np.shape(leaf))} and was staged as "
                    f"{spec.dtype}{list(spec.shape)}. Stage again with the new parameters."
                )
            leaves.append(leaf)
        return leaves

    def check_dataset(self, dataset: PyTree) -> tuple[list[Any], int]:
        source = self.source
        leaves, tree = jax.tree.flatten(_bare(dataset))
        if tree != source.batch_tree:
            raise StageError(
                f"the dataset is {tree}, and the batch that was staged is {source.batch_tree}. "
                "Both must have one structure."
            )
        total = rows_of(dataset)
        for name, leaf, spec in zip(self.names, leaves, source.batch, strict=True):
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            if leaf.shape[1:] != spec.shape[1:] or dtype != spec.dtype:
                raise StageError(
                    f"'{name}' of the dataset has rows of {dtype}{list(leaf.shape[1:])}, and the "
                    f"batch that was staged has {spec.dtype}{list(spec.shape[1:])}."
                )
        return leaves, total


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _needs_values(error: Exception) -> str:
    here = Path(__file__).parent
    libraries = tuple(str(Path(file).parent) for file in (jax.__file__, np.__file__, here))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(libraries)][-1]
    return (
        f"the loss can't be traced: at {theirs.filename}:{theirs.lineno} ({theirs.name}) a shape "
        "or a branch depends on values. Write it with jnp.where, jax.lax.cond, or a `size=`. "
        f"JAX says: {str(error).splitlines()[0]}"
    )


def _bare(batch: PyTree) -> PyTree:
    """Features as a batch, without their statistics."""
    return dataclasses.replace(batch, stats=None) if isinstance(batch, Features) else batch


def _arrays(var: jex.Var, encoding: str | None) -> int:
    return 2 if encoding == "int8" and is_encoded(aval(var).dtype, encoding) else 1
