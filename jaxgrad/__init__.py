"""Selective differentiation and fine-tuning for JAX, as pure functions on any pytree."""
