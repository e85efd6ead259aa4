"""What `experiments.sample` is made of.

run   prompts to codes to pictures, with progress
"""
