import atexit
import tempfile

import jax

# Scripts that write golden files: they need PyTorch, and run by hand.
collect_ignore = ["goldens"]

# The library must hold under the strictest settings a user can choose.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same small programs: a cache of this session saves a third of its time.
_cache = tempfile.TemporaryDirectory(prefix="jaxgrad-tests-")
atexit.register(_cache.cleanup)
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
