"""The parts of `experiments.pretokenize`.

run            the run itself: from its settings to a complete set
rows           one row, prepared: picture cropped, caption as ids
folder         OUT: begun, continued and finished
encoding       rows to shards, with work on the CPU while the device encodes
shard_claims   which process makes which shard
"""
