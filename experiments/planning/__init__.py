"""Predicted time and memory of a run.

plan       `experiments.plan`: a plan for each number of devices
devices    peaks of devices, and the time of a step on them
report     a plan as a table
roofline   the micro batches at which computation hides communication
memory     predicted and free memory of this run, and the message when memory runs out
"""
