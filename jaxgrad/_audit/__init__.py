"""Measures what a training step does to each parameter, with reasons.

`audit.py` runs the experiments and calls the rest: `train_step` normalises someone's training
step, `ablation` finds causes, `rules` states leaks, `liveness` reads programs, `cost` asks XLA.
May import the machines below (`_staging`, `_autograd`, `_checkpoint`) and what they stand on. A
new kind of leak is a rule in `rules.py` and its row in the tests.
"""
