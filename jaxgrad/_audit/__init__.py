"""Measures what a training step does to each parameter, with reasons.

`audit.py` runs the experiments and calls the rest: `train_step` normalises a training step,
`ablation` finds causes, `rules` states leaks, `liveness` reads programs, `cost` asks XLA. May
import the machinery below (`_staging`, `_autograd`, `_checkpoint`) and what that builds on. A new
kind of leak is a rule in `rules.py` and its row in the tests.
"""
