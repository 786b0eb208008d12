"""JAX's programs: their form, and the walks over them.

Imports JAX only. What an equation with a program inside (scan, cond, while, jit, checkpoint, custom
rules, shard_map) is called and how its parameters are laid out is known to `views.py` alone: a new
form in a new JAX is one more line there, read by everything that walks.
"""

import jax

# pip sees to that, but for an environment that pins JAX: there the first missing name of
# `jax.extend` would be all that one is told.
if jax.__version_info__ < (0, 10, 2):
    raise ImportError(
        f"jax {jax.__version__} is installed, and jaxgrad reads the programs of jax 0.10.2 and "
        "later: install one of these (pip install -U jax), on Python 3.11 or newer."
    )
