"""A saved optimizer state put back, leaf by leaf, into that of another selection or optimizer.

Moments, sums and weights follow their leaf; a counter follows the leaves that it serves, whatever
stands around either: the order and number of groups, a clip or an average in the chain, a wrapper.
A leaf that is newly trained starts as in a new run. What can't be kept so is said in one line:
a counter of old leaves that a new leaf joins, and counters of several groups that are one now.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad._checkpoint.run import Saved
from jaxgrad._devices.processes import whole
from jaxgrad._optim.parts import Slot, parts_of, slots_of
from jaxgrad._text import count, listed, spec
from jaxgrad._tree.flat import PyTree, flatten, is_array, is_key, paths


class Shared(NamedTuple):
    """An array that now serves leaves with and without a past."""

    what: str  # its kind, and its value if it is one number
    new: frozenset[str]
    old: frozenset[str]


def restore_opt_state(saved: Saved, fresh: PyTree, trainable: PyTree) -> tuple[PyTree, str]:
    """The optimizer state with the arrays that survive, and a line on what was resumed."""
    flat = flatten(fresh)
    needed = {p: x for p, x in zip(flat.paths, flat.leaves, strict=True) if is_array(x)}
    record = saved.record
    now = slots_of([*needed], parts_of(fresh, trainable), tuple(paths(trainable)))
    then = slots_of([*saved.opt_state], record.parts, record.trained)
    fits = {slot.path: spec(saved.opt_state[slot.path]) for slot in then}
    kept: dict[str, list[Slot]] = {}
    for path, sources in _sources(now, then).items():
        if same := [s for s in sources if fits[s.path] == spec(needed[path])]:
            kept[path] = same
    values: dict[str, Any] = {}
    notes: list[str] = []
    for slot in now:
        if sources := kept.get(slot.path):
            values[slot.path], merged = _value(slot, sources, saved.opt_state)
            notes += [merged] if merged else []
    state = flat.treedef.unflatten(
        [values.get(p, x) for p, x in zip(flat.paths, flat.leaves, strict=True)]
    )
    notes = [*_joined(_shared(now, kept, values)), *notes, *_overridden(needed, values)]
    return state, "; ".join([_line(saved, trainable, now, then, kept), *notes])


# Which saved array, or arrays, a needed one goes on from.


def _sources(now: Iterable[Slot], then: Iterable[Slot]) -> dict[str, list[Slot]]:
    """By the path of each needed array that has any: one, or one for each of several groups."""
    by_leaves: dict[str, dict[frozenset[str], list[Slot]]] = defaultdict(lambda: defaultdict(list))
    for slot in then:
        by_leaves[_key(slot)][slot.serves].append(slot)
    wanted: dict[tuple[str, frozenset[str]], list[Slot]] = defaultdict(list)
    for slot in now:
        wanted[_key(slot), slot.serves].append(slot)
    found: dict[str, list[Slot]] = defaultdict(list)
    for (key, serves), slots in wanted.items():
        held = by_leaves[key]
        for leaves in [serves] if serves in held else [s for s in held if s & serves]:
            for path, source in _paired(slots, held[leaves]).items():
                found[path].append(source)
    return {path: _at_same_place(path, sources) for path, sources in found.items()}


def _key(slot: Slot) -> str:
    return f"{slot.kind} of {slot.leaf}" if slot.leaf is not None else slot.kind


def _paired(now: Sequence[Slot], then: Sequence[Slot]) -> dict[str, Slot]:
    """Arrays of one kind and of the same leaves in pairs, as two schedules of a chain are.

    In their order if there are as many as before, or else first those that are where they were.
    """
    pairs: dict[str, Slot] = {}
    if len(now) != len(then):
        place = {_place(slot.path): slot for slot in then}
        pairs = {s.path: place[_place(s.path)] for s in now if _place(s.path) in place}
    left = [s for s in then if s not in pairs.values()]
    unpaired = [s for s in now if s.path not in pairs]
    return pairs | {s.path: source for s, source in zip(unpaired, left, strict=False)}


def _at_same_place(path: str, sources: list[Slot]) -> list[Slot]:
    same = [s for s in sources if _place(s.path) == _place(path)]
    return same or sources


def _place(path: str) -> str:
    """The path without the number of the group in `param_groups`."""
    return re.sub(r"(^|/)groups/\d+(?=/)", r"\1groups", path)


# Their values.


def _value(
    slot: Slot, sources: Sequence[Slot], arrays: Mapping[str, jax.Array]
) -> tuple[jax.Array, str]:
    """The value to go on with, and a note if the sources differ."""
    found = [jnp.asarray(arrays[s.path]) for s in sources]
    if len({_bits(x) for x in found}) == 1:
        return found[0], ""
    if all(jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == 0 for x in found):
        best = max(range(len(found)), key=lambda i: int(found[i]))
    else:
        best = max(range(len(found)), key=lambda i: len(sources[i].serves & slot.serves))
    were = " and ".join(
        f"{_shown(x)} for {_named(s.serves & slot.serves)}".lstrip()
        for s, x in zip(sources, found, strict=True)
    )
    return found[best], (
        f"{slot.kind} was {were}, and is one for all now, that of "
        f"{_named(sources[best].serves & slot.serves)}: to keep each, keep their groups apart"
    )


def _bits(x: jax.Array) -> bytes:
    return np.asarray(whole(jax.random.key_data(x) if is_key(x) else x)).tobytes()


def _shown(x: jax.Array) -> str:
    return str(np.asarray(whole(x))) if x.ndim == 0 and not is_key(x) else spec(x)


def _named(leaves: Collection[str]) -> str:
    return listed([repr(path) for path in sorted(leaves)])


# What is said.


def _shared(
    now: Iterable[Slot], kept: Mapping[str, Sequence[Slot]], values: Mapping[str, jax.Array]
) -> list[Shared]:
    found = []
    for slot in now:
        old = frozenset[str]().union(*(s.serves for s in kept.get(slot.path, ())))
        if old and (new := slot.serves - old):
            value = values[slot.path]
            one = value.ndim == 0 and not is_key(value)
            what = f"{slot.kind} = {_shown(value)}" if one else slot.kind
            found.append(Shared(what, new, old & slot.serves))
    return found


def _joined(shared: Iterable[Shared]) -> list[str]:
    """A note for each set of leaves that joins others."""
    whats: dict[tuple[frozenset[str], frozenset[str]], list[str]] = defaultdict(list)
    for what, new, old in shared:
        whats[new, old].append(what)
    return [
        f"{_named(new)} {'goes' if len(new) == 1 else 'go'} on from {listed(what)} of "
        f"{_named(old)}, so the first steps are not those of a new run: for that, use a group of "
        "its own in param_groups"
        for (new, old), what in whats.items()
    ]


def _overridden(needed: Mapping[str, Any], values: Mapping[str, jax.Array]) -> list[str]:
    """A note for each hyperparameter of `inject_hyperparams` whose value was changed in the call.

    It is a part of the state, and so the run's. One with a schedule has another value at each step.
    """
    notes = []
    for path, value in values.items():
        node, found, name = path.rpartition("hyperparams/")
        scheduled = any(p.startswith(f"{node}hyperparams_states/{name}/") for p in needed)
        if found and not scheduled and value.ndim == 0 and _bits(value) != _bits(needed[path]):
            notes.append(
                f"{name} goes on at {_shown(value)}, the run's, and not at this call's "
                f"{_shown(needed[path])}: to change it, use no inject_hyperparams"
            )
    return notes


def _line(
    saved: Saved,
    trainable: PyTree,
    now: Sequence[Slot],
    then: Sequence[Slot],
    kept: Mapping[str, Sequence[Slot]],
) -> str:
    trained, before = set(paths(trainable)), set(saved.record.trained)
    line = f"resumed at step {saved.record.step}"
    for what, leaves in (("newly trained", trained - before), ("frozen now", before - trained)):
        if leaves:
            line += f"; {what}: {_named(leaves)}"
    used = {s.path for sources in kept.values() for s in sources}
    added = [slot for slot in now if slot.path not in kept]
    dropped = [slot for slot in then if slot.path not in used]
    if trained != before or added or dropped:
        arrays = count([*kept], "array", verb=False)
        line += f"; optimizer state: {arrays} kept, {_kinds(added, 'added')}, "
        line += _kinds(dropped, "dropped")
    return line


def _kinds(slots: Sequence[Slot], done: str) -> str:
    kinds = dict.fromkeys(slot.kind for slot in slots)
    return f"{len(slots)} {done}" + (f" ({listed(kinds)})" if kinds else "")
