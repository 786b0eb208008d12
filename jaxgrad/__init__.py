"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree.

Each public name is written once, in `__init__.pyi`. Type checkers and the documentation read it,
and so does `lazy_loader`, which imports a name's module when the name is first used: `import
jaxgrad` alone imports neither JAX nor Flax.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
