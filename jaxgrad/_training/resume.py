"""A saved step put back into a tree of parameters, whatever is trained now.

Everything goes by path. A leaf that was trained and is frozen now keeps the value that it had
reached. Steps that would not be those of the run, on other rows, are refused.
"""

from pathlib import Path

import jax

from jaxgrad._checkpoint.arrays import check_fit
from jaxgrad._checkpoint.record import CheckpointError, Position, Settings
from jaxgrad._checkpoint.run import Saved
from jaxgrad._text import listed
from jaxgrad._tree.flat import PyTree, flatten, is_array


def restore_params(saved: Saved, params: PyTree, where: str) -> PyTree:
    """The parameters with their saved values: all of them, or an error if one does not fit."""
    flat = flatten(params)
    wanted = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)}
    check_fit(Path(where), saved.params, wanted)
    return flat.treedef.unflatten(
        [saved.params.get(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True)]
    )


def restore_stats(saved: Saved, stats: PyTree, where: str) -> PyTree:
    """The statistics with their saved values; those given if the run had none."""
    if not saved.stats or stats is None:
        return stats
    flat = flatten(stats)
    wanted = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)}
    check_fit(Path(where), saved.stats, wanted)
    return flat.treedef.unflatten(
        [saved.stats.get(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True)]
    )


def refuse_other_settings(saved: Saved, settings: Settings, where: str) -> None:
    """Raises if the steps to come would not be those of the run."""
    for name in ("rows", "batch_size", "key"):
        then, now = getattr(saved.record.settings, name), getattr(settings, name)
        if then != now:
            raise CheckpointError(
                f"the run in '{where}' has {name} {then}, but this call {now}: its next step would "
                "take other rows. Call fit with the run's arguments, or start a new run."
            )
    then, now, none = saved.record.settings.data, settings.data, "not there"
    if then != now:
        others = [
            f"{repr(p) if p else 'the array'} was {then.get(p, none)} and is {now.get(p, none)}"
            for p in sorted(then.keys() | now.keys())
            if then.get(p) != now.get(p)
        ]
        raise CheckpointError(
            f"the run in '{where}' has other data (dtype, shape and a digest of rows): "
            f"{listed(others)}. Pass the arrays of the run with their rows in the same order, or "
            "start a new run from its parameters: jaxgrad.load(run, into=params)."
        )


def position_of(saved: Saved, where: str) -> Position:
    """How far this process had read a stream."""
    positions = saved.record.positions
    if len(positions) != jax.process_count() and positions[0] != Position():
        raise CheckpointError(
            f"the run in '{where}' read a stream in {len(positions)} processes, each its own part, "
            f"but now there are {jax.process_count()}. Resume with the same number."
        )
    return positions[min(jax.process_index(), len(positions) - 1)]
