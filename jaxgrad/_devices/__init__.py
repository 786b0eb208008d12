"""Devices, processes, signals and the terminal: placement of arrays, other processes, interrupts.

May import `_tree` and `_text`. Whatever a training run or staging must know about the machine
belongs here.
"""
