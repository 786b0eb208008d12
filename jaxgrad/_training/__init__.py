"""`fit`: a job, its plan and session, jitted calls of many steps, and the rows that they take.

`evaluate` and `predict`: a function compiled and run over the batches of a dataset.
May import everything below; only the face and `cli` import it. A callback belongs in
`callbacks.py`.
"""
