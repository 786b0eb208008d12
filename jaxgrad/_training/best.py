"""The best parameters of a run, which `fit` returns instead of the last.

While the run goes on they are kept in memory. Which step is the best is decided by the history
alone, and a run that is saved keeps that step on disk, so a resumed run returns what it would have
returned without the interruption.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from jaxgrad._checkpoint.record import CheckpointError, Mode, best_first
from jaxgrad._checkpoint.run import Checkpoints, Run
from jaxgrad._training.state import Callback, TrainState
from jaxgrad._tree.flat import PyTree, flatten


@dataclasses.dataclass(frozen=True)
class RestoreBest:
    """A callback that asks `fit` to return the best parameters.

    Attributes:
        callback: what it does besides.
        metric: what makes a step good: a name in its entry of the history.
        mode: whether the least or the greatest is best.
    """

    callback: Callback
    metric: str
    mode: Mode

    def __call__(self, state: TrainState) -> None:
        self.callback(state)


class Best:
    """The best of the chunks so far; a callback, to be called after the others.

    Args:
        metric: a name in the entries of the history.
        mode: whether the least or the greatest is best.
    """

    def __init__(self, metric: str, mode: Mode) -> None:
        self.metric = metric
        self.mode: Mode = mode
        self.kept: TrainState | None = None

    def __call__(self, state: TrainState) -> None:
        """Keeps the parameters of a state that is the best so far."""
        if state.history and self._step(state) == state.step:
            # Of the copy that a callback is passed: the frozen leaves are shared.
            self.kept = dataclasses.replace(state, opt_state=None)

    def is_kept(self, step: int) -> bool:
        """Whether the parameters of this step are those that are kept."""
        return self.kept is not None and self.kept.step == step

    def checkpoints(self, config: Checkpoints) -> Checkpoints:
        """Where to save a run, whose best step must stay on disk.

        Raises:
            ValueError: the run is to keep steps that are best by something else.
        """
        if not config.best:
            return dataclasses.replace(config, best=1, metric=self.metric, mode=self.mode)
        if (config.metric, config.mode) != (self.metric, self.mode):
            raise ValueError(
                f"Checkpoints(best={config.best}) keeps the best by {config.metric!r}, "
                f"{config.mode!r}, and early_stopping(restore_best=True) returns the best by "
                f"{self.metric!r}, {self.mode!r}. Pass both the same metric and mode."
            )
        return config

    def resume(self, state: TrainState, trained: Sequence[str], run: Run) -> None:
        """Reads the best step of a run that goes on; `trained` are the paths that it trains now.

        Raises:
            CheckpointError: it is not saved, or damaged.
        """
        step = self._step(state)
        if step is None or step == state.step:
            self(state)
            return
        try:
            leaves, stats = run.values(step, trained)
        except CheckpointError as e:
            raise CheckpointError(
                f"early_stopping(restore_best=True) returns the parameters of step {step}, the "
                f"best by {self.metric!r}, and the run does not have them: {e} Resume without "
                "restore_best, or start a new run with it, which keeps its best step."
            ) from e
        self.kept = dataclasses.replace(
            state,
            params=_filled(state.params, leaves),
            stats=_filled(state.stats, stats),
            step=step,
            opt_state=None,
        )

    def restored(self, state: TrainState) -> TrainState:
        """The state that a run ends with, with the best parameters in it."""
        self(state)
        if self.kept is None:  # no chunk has the metric as a number
            return state
        return dataclasses.replace(state, params=self.kept.params, stats=self.kept.stats)

    def _step(self, state: TrainState) -> int | None:
        found = {int(r["step"]): r[self.metric] for r in state.history if self.metric in r}
        return next(iter(best_first(found, self.mode)), None)


def best_of(callbacks: Sequence[Callback]) -> Best | None:
    """What keeps the best parameters, if a callback asks for them.

    Raises:
        ValueError: several ask, by other metrics.
    """
    found = [Best(c.metric, c.mode) for c in callbacks if isinstance(c, RestoreBest)]
    asked = dict.fromkeys(f"{best.metric!r}, {best.mode!r}" for best in found)
    if len(asked) > 1:
        raise ValueError(
            "fit returns the parameters of one step, and early_stopping(restore_best=True) asks "
            f"for the best by {'; by '.join(asked)}. Pass restore_best to one."
        )
    return found[0] if found else None


def _filled(tree: PyTree, leaves: Mapping[str, jax.Array]) -> PyTree:
    """The tree, with these leaves in place of its own."""
    flat = flatten(tree)
    return flat.treedef.unflatten(
        [leaves.get(path, x) for path, x in zip(flat.paths, flat.leaves, strict=True)]
    )
