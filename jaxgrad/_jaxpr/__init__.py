"""JAX's programs: their form, and the walks over them.

`views.py` alone knows what an equation with a program inside (scan, cond, while, jit, checkpoint,
custom rules, shard_map) is called and how its parameters are laid out. A new form in a new JAX is
one more line there, read by everything that walks. May import `_tree` and `_text`.
"""

import jax

# pip enforces this bound, except where an environment pins JAX: there the first name that
# `jax.extend` lacks would be the only message.
if jax.__version_info__ < (0, 10, 2):
    raise ImportError(
        f"jax {jax.__version__} is installed, and jaxgrad reads the programs of jax 0.10.2 and "
        "later: install one of these (pip install -U jax), on Python 3.11 or newer."
    )
