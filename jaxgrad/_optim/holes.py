"""Transformations that can't take a tree with holes, found by experiment and named.

JAX and almost all of Optax read `None` as an empty subtree. A transformation that maps with
`is_leaf=lambda x: x is None`, or that looks at each leaf's shape, fails deep inside on one, with a
message about `NoneType`. So where a transformation fails, it is tried on the same leaves without
their holes: if it takes those, the holes are what it can't take.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import optax

from jaxgrad._optim.apply_updates import UpdateError
from jaxgrad._text import listed
from jaxgrad._tree.flat import Flat, PyTree, abstract, is_array, is_hole


@contextlib.contextmanager
def refusing_holes(tx: optax.GradientTransformation, given: Flat, who: str) -> Iterator[None]:
    """Explains an error in its block if it is that a transformation can't take holes.

    Args:
        tx: the transformation that the block calls.
        given: the tree that it is given, flattened.
        who: what the message calls the transformation.

    Raises:
        UpdateError: the transformation fails on the tree, and takes its leaves without the holes.
    """
    try:
        yield
    except (AttributeError, TypeError, ValueError) as e:
        holes = [repr(p) for p, x in zip(given.paths, given.leaves, strict=True) if is_hole(x)]
        if not holes or isinstance(e, UpdateError):
            raise
        shapes = abstract(given)
        arrays = [leaf for leaf in shapes.leaves if is_array(leaf)]
        if not _takes(tx, arrays) or _takes(tx, shapes.treedef.unflatten(shapes.leaves)):
            raise
        raise UpdateError(
            f"{who} can't take a tree with holes (None for a leaf that it does not train), and "
            f"there is one at {listed(holes)}: {type(e).__name__}: {str(e).splitlines()[0]}. Show "
            "it optax.MaskedNode instead: optax.masked(tx, jaxgrad.select(params, wrt).mask), "
            "with what it trains as wrt."
        ) from e


def _takes(tx: optax.GradientTransformation, tree: PyTree) -> bool:
    def step(params: Any) -> Any:
        return tx.update(params, tx.init(params), params)

    try:
        jax.eval_shape(step, tree)
    except Exception:  # whatever it raises, it does not take the tree
        return False
    return True
