"""Time and memory of a run, predicted.

plan       the command: a plan for each number of devices
devices    peaks of devices, and the time of a step on them
report     a plan as a table
roofline   where communication is hidden behind computation
memory     predicted and free memory of this run, and the message where memory is refused
"""
