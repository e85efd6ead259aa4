"""What a training step costs, predicted without running it.

cost         FLOPs and bytes, by arithmetic
footprint    memory over the course of a step, by running it on tensors without storage
live_bytes   which tensors are alive while a function runs
"""
