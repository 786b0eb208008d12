"""Fills the leaves of a Flax tree from PyTorch names.

Three things must be settled before a value is moved: which module fills which layer (`pairing`),
how the layer's type lays out its tensors (`layouts`, `resolve`), and shapes and dtypes (`plan`).
"""

from collections.abc import Sequence
from typing import TypeVar

from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.wrt import Wrt
from jaxgrad._tree.wrt import match as _chosen
from jaxgrad.torch._mapping import pairing
from jaxgrad.torch._mapping import rules as _rules
from jaxgrad.torch._mapping.flax_layers import Layer, Tree, bare, read_tree
from jaxgrad.torch._mapping.plan import Ledger
from jaxgrad.torch._mapping.report import Report
from jaxgrad.torch._mapping.rules import Rules
from jaxgrad.torch._mapping.source import File, Source

T = TypeVar("T")


def load_into(params: T, source: Source, *, rules: Rules = (), wrt: Wrt | None = None) -> T:
    """Returns a Flax tree filled with the values of a PyTorch file.

    Layer types decide the layouts. They come from the classes of an NNX module or the names of
    Flax's leaves (`kernel`, `scale`, `embedding`, ...), from the structure in a whole-module file,
    and from rules.

    Args:
        params: an NNX module or State, Linen variables or their params, or any pytree whose
            leaves have a shape and a dtype (the abstract tree of `jax.eval_shape`, for one). It
            is not modified.
        source: the file's path, a `Checkpoint`, or a mapping from PyTorch names to arrays.
        rules: ordered (pattern, replacement) pairs from PyTorch names to Flax paths, for names
            that the structure leaves open, and `Rule`s for what else must be declared.
        wrt: the Flax leaves to load, all by default; see `select`. The file must have each of
            them. The others keep their initial value: `"!head"` loads all but a new head.

    Returns:
        A new tree of the same kind.

    Raises:
        MappingError: a name is missing, left over, or differs in shape or dtype; a layout or a
            flatten must be declared. The message lists all problems, with the nearest candidates.
        SelectionError: `wrt` does not fit `params`; see `select`.
        TorchFileError: the file can't be read.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> params = {"fc": {"kernel": np.zeros((3, 2), np.float32)}}
        >>> jg.torch.load_into(params, {"fc.weight": np.ones((2, 3), np.float32)})
        {'fc': {'kernel': array([[1., 1.], [1., 1.], [1., 1.]], dtype=float32)}}

    Source: `model.load_state_dict(torch.load(path))`.
    """
    return match(params, source, rules=rules, wrt=wrt).apply()


def match(params: PyTree, source: Source, *, rules: Rules = (), wrt: Wrt | None = None) -> Report:
    """Returns a report of what `load_into` would do; its `apply()` does it.

    Args:
        params: as in `load_into`.
        source: as in `load_into`.
        rules: as in `load_into`.
        wrt: as in `load_into`.

    Returns:
        A `Report`: what fills each leaf, by which layout and why, and which names are unused.

    Raises:
        MappingError, SelectionError, TorchFileError: as in `load_into`.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> params = {"fc": {"kernel": np.zeros((3, 2), np.float32)}}
        >>> jg.torch.match(params, {"fc.weight": np.ones((2, 3), np.float32)})
        1 of 1 leaves filled
          fc/kernel <- fc.weight  float32[3,2]  (out, in) -> (in, out)  same name

    Source: the key lists that `load_state_dict` returns, with the layouts.
    """
    file = File.open(source)
    tree = read_tree(params)
    made = _rules.as_rules(rules)
    packed = any(name.rpartition(".")[2] in _rules.PACKED for name in file.tensors)
    layers = tree.layers(packed_attention=packed)
    names = _rules.group(
        file.tensors,
        made,
        own=_own_names(layers),
        bare=[layer.path for layer in layers if layer.kind == "?"],
    )
    ledger = Ledger(file, tree, _selected(tree, wrt), dropped=dict(names.dropped))
    matches = pairing.pair(layers, names.groups, file.tensors, ledger.loads)
    ledger.settle(matches)
    ledger.account(layers, names.groups, matches)
    return ledger.report()


def _own_names(layers: Sequence[Layer]) -> dict[str, str]:
    """Maps leaf paths, with and without their collection, to the path of their only tensor."""
    own = {}
    for layer in layers:
        for part in layer.parts():
            leaf = layer.leaves[part.leaf]
            if len(part.sources) == 1 and part.block == (0, 1):
                path = "/".join(name for name in (layer.path, part.sources[0]) if name)
                own |= {leaf.path: path, bare(leaf.path): path}
    return own


def _selected(tree: Tree, wrt: Wrt | None) -> set[str]:
    chosen = [True] * len(tree.flat.paths) if wrt is None else _chosen(tree.flat, wrt)
    return {leaf.path for leaf in tree.leaves if chosen[leaf.index]}
