"""The fingerprint of a dataset: which arrays a run was trained on, for a run that resumes.

A resumed run is the same to the bit only on the same rows in the same order, and a dataset of as
many rows in another order looks no different. Small arrays are digested completely; of a large one,
rows spread over all of it, since a memory-mapped file may take an hour to read. That finds another
order, another scale, other labels, another split; it does not find a single row that was edited.

Arrays are digested as the steps see them, so that NumPy's float64 and JAX's float32 of it are one.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxgrad._disk.safetensors import raw
from jaxgrad._text import nbytes
from jaxgrad._tree.flat import PyTree, flatten, is_hole, is_key

# Bytes of an array that are digested: all of a smaller one.
_BYTES = 16 * 2**20
# Rows of a larger one: each may be a read from a disk of its own.
_ROWS = 4096


def fingerprint(dataset: PyTree) -> Mapping[str, str]:
    """Dtype, shape and digest of each array by path: `{"x": "float32[29,3] 9f86d081884c7d65"}`."""
    flat = flatten(dataset)
    leaves = zip(flat.paths, flat.leaves, strict=True)
    return {path: _of_array(leaf) for path, leaf in leaves if not is_hole(leaf)}


def _of_array(x: Any) -> str:
    kind = ""
    if is_key(x):
        kind, x = f"{jax.random.key_impl(x)} ", jax.random.key_data(x)
    x = x if hasattr(x, "dtype") else np.asarray(x)
    rows = _sample(x)
    if rows.dtype.hasobject:  # its bytes are addresses
        content = repr(rows.tolist()).encode()
    else:
        native = rows.dtype.newbyteorder("=")
        rows = rows.astype(jax.dtypes.canonicalize_dtype(native), copy=False)
        content = raw(rows)
    shape = ",".join(map(str, x.shape))
    return f"{kind}{rows.dtype.name}[{shape}] {hashlib.sha256(content).hexdigest()[:16]}"


def _sample(x: Any) -> np.ndarray:
    """The array, or rows of it: the first, the last, and others at random between them."""
    if nbytes(x) <= _BYTES:
        return np.asarray(x)
    count = min(max(_BYTES // (nbytes(x) // len(x)), 2), _ROWS, len(x))
    between = np.random.default_rng(0).integers(0, len(x), count - 2)
    # In order: HDF5 refuses others, and a disk reads them faster.
    return np.asarray(x[np.unique([0, *between, len(x) - 1])])
