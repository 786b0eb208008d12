"""`fit`: a plan, jitted calls of many steps, the rows they take, and what is kept of them.

May import everything below; only the face and `cli` import it. A callback belongs in
`callbacks.py`.
"""
