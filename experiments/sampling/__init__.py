"""The parts of `experiments.sample`.

run   prompts to codes to pictures, with progress
"""
