"""What `experiments.pretokenize` is made of.

run            the run: settings to a complete set
rows           one row, prepared: picture cut, caption as ids
folder         OUT: what a run finds in it, and how the set becomes complete
encoding       rows to shards, with the device kept busy
shard_claims   which process makes which shard
"""
