"""Layers stacked along an axis: the first ones frozen, the last ones trained.

Under `lax.scan` (or `nn.scan`, `nnx.scan`) all layers of a kind are one leaf, and a leaf is either
selected or not. A mask within a leaf would require every function that takes a `wrt` to
handle slices. Two leaves require nothing: the stack is split into `first` and `last`, which have
paths like any others, and joined inside the loss. Staging sees the scan over the two, and runs it
as two scans, the first one frozen.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp

from jaxgrad._text import spec
from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.select import select
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.wrt import Wrt

T = TypeVar("T")


def split_layers(params: T, wrt: Wrt, *, last: int) -> tuple[PyTree, Callable[[PyTree], T]]:
    """Splits stacked layers in two, so that `wrt` can select the last ones.

    Args:
        params: any pytree.
        wrt: the leaves with layers along their first axis, all of one length; see `select`.
        last: how many layers to split off, at least one and not all.

    Returns:
        `(split, join)`. `split` has `{"first": x[:-last], "last": x[-last:]}` for each leaf `x`
        that is stacked, so that `wrt="blocks/**/last"` trains the last layers. `join(split)` is the
        whole tree again, within a loss (`lambda p, batch: loss(join(p), batch)`) and to save it.

    Raises:
        SelectionError: see `select`; a leaf has no first axis, their lengths differ, or `last` is
            not from 1 to below that length.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, batch):
        ...     layer = lambda h, w: (jnp.tanh(h @ w), None)
        ...     h, _ = jax.lax.scan(layer, batch["x"], params["blocks"])
        ...     return jnp.mean(h @ params["head"])
        >>> params = {"blocks": jnp.ones((12, 4, 4)), "head": jnp.ones((4, 1))}
        >>> split, join = jg.split_layers(params, "blocks", last=2)
        >>> jg.paths(split)
        ['blocks/first', 'blocks/last', 'head']
        >>> of_split = lambda p, batch: loss(join(p), batch)
        >>> grads = jg.grad(of_split, wrt=["**/last", "head"])(split, {"x": jnp.ones((5, 4))})
        >>> grads["blocks"]["last"].shape, grads["blocks"]["first"]
        ((2, 4, 4), None)

    Source: `for block in model.blocks[:-2]: block.requires_grad_(False)`.
    """
    selection = select(params, wrt)
    flat, chosen = selection.named(params), selection.flags
    lengths = {}
    for path, leaf, c in zip(flat.paths, flat.leaves, chosen, strict=True):
        if c and jnp.ndim(leaf) == 0:
            raise SelectionError(f"'{path}' is {spec(leaf)}: it has no axis of layers.")
        if c:
            lengths.setdefault(len(leaf), path)
    if len(lengths) != 1:
        found = ", ".join(f"'{path}' has {n}" for n, path in lengths.items())
        raise SelectionError(f"stacked leaves must have one number of layers, but {found}.")
    (layers,) = lengths
    if not 0 < last < layers:
        raise SelectionError(f"last={last} of {layers} layers; it must be from 1 to {layers - 1}.")

    def join(split: PyTree) -> T:
        parts = flat.treedef.flatten_up_to(split)
        return flat.treedef.unflatten(
            [
                jnp.concatenate([part["first"], part["last"]]) if c else part
                for part, c in zip(parts, chosen, strict=True)
            ]
        )

    split = flat.treedef.unflatten(
        [
            {"first": leaf[:-last], "last": leaf[-last:]} if c else leaf
            for leaf, c in zip(flat.leaves, chosen, strict=True)
        ]
    )
    return split, join
