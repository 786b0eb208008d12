"""Reads and walks jaxprs.

`views.py` alone knows the names and the parameters of the equations that hold programs (scan, cond,
while, jit, checkpoint, custom rules, shard_map). To support a new form in a new JAX, add it there;
everything that walks a program reads it through a view. May import `_tree` and `_text`.
"""

import jax

# pip enforces this bound unless an environment pins JAX. Then the only message would be about the
# first name that `jax.extend` lacks.
if jax.__version_info__ < (0, 10, 2):
    raise ImportError(
        f"jax {jax.__version__} is installed, and jaxgrad reads the programs of jax 0.10.2 and "
        "later: install one of these (pip install -U jax), on Python 3.11 or newer."
    )
