"""Gradients that an optimizer accumulates over steps, which the steps of a run may not fill.

`optax.MultiSteps(tx, k)` applies the mean of k gradients at each k-th step. The last steps of a run
may be fewer, and their gradients then stay in the optimizer's state: lost, unless the run is
resumed. And it takes the mean of the steps and not of their rows, so a short last batch counts as
much as a full one. Both are warnings, because the run is still what was asked for.
"""

import warnings
from typing import NamedTuple, TypeGuard

import jax
import numpy as np
import optax

from jaxgrad._training.job import Job
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.types import Params


class Accumulation(NamedTuple):
    """What is known of the accumulation in a run.

    Attributes:
        found: whether the optimizer has a `MultiSteps` in it.
        said: whether there was a warning of short batches.
    """

    found: bool
    said: bool


def check_batches(job: Job, params: Params) -> Accumulation:
    """Warns of a short last batch, before the first step, if the optimizer accumulates."""
    found = bool(_states(jax.eval_shape(job.tx.init, job.selection.split(params)[0])))
    short = 0 if job.streams or job.rows < job.batch_size else job.rows % job.batch_size
    if found and short and job.epochs:
        whole = job.rows - short
        _warn(
            f"tx accumulates gradients (optax.MultiSteps), and the last batch of each epoch has "
            f"{short} of batch_size={job.batch_size} rows but counts as much as a full one. Take "
            f"the rows that batch_size divides, {whole} of {job.rows}, or another batch_size."
        )
    return Accumulation(found, bool(short))


def check_rest(known: Accumulation, opt_state: PyTree, sizes: set[int]) -> None:
    """Warns, after the last step, of gradients that were not applied, and of short batches."""
    if not known.found:
        return
    if len(sizes) > 1 and not known.said:
        _warn(
            f"tx accumulates gradients (optax.MultiSteps), and the batches had {sorted(sizes)} "
            "rows, which count alike. Drop the short ones (drop_remainder=True in Grain's batch)."
        )
    rest = max(int(np.max(state.mini_step)) for state in _states(opt_state))
    if rest:
        _warn(
            f"tx accumulates gradients (optax.MultiSteps), and the last {rest} of the run "
            f"{'is' if rest == 1 else 'are'} not applied: the steps are not a multiple of "
            "every_k_schedule. Choose epochs and batch_size so that they are; or resume the run, "
            "whose checkpoint holds what is accumulated."
        )


def _states(opt_state: PyTree) -> list[optax.MultiStepsState]:
    def is_state(node: object) -> TypeGuard[optax.MultiStepsState]:
        return isinstance(node, optax.MultiStepsState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)  # the line that calls fit
