"""The types of Flax NNX that a tree may hold, without importing Flax if it is not in use."""

import sys


def nnx_types(*names: str) -> tuple[type, ...]:
    """Classes of `flax.nnx`, or none if Flax is not loaded.

    An NNX object can't exist before Flax is loaded, so asking for its class never has to pay
    for the import.
    """
    nnx = sys.modules.get("flax.nnx")
    # While it is being imported, the module lacks some of its names.
    return tuple(getattr(nnx, name) for name in names if hasattr(nnx, name))
