import jax

# Scripts that write golden files: they need PyTorch, and run by hand.
collect_ignore = ["goldens"]

# The library must hold under the strictest settings a user can choose.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
