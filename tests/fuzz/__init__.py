"""Files of strangers, mutated: what a reader may do with them, and a machine that looks whether it does anything else."""
