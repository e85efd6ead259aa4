"""What `experiments.sample` is made of."""
