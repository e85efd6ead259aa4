"""What `experiments.pretokenize` is made of.

encoding       rows to shards, with the device kept busy
shard_claims   which process makes which shard
"""
