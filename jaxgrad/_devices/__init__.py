"""Devices, processes and signals: where arrays are placed, who else trains, what interrupts.

May import `_tree` and `_text`. What a file of `_training` needs to know of the machine is asked
here.
"""
