"""Devices, processes, signals and the terminal.

May import `_tree` and `_text`. Add here what a training run or staging must know about the machine:
where arrays are placed, what other processes do, which signals arrive.
"""
