"""The parts of `experiments.pretokenize`.

run            the run itself: from its settings to a complete set
rows           one row, prepared: picture cropped, caption as ids
folder         OUT: begun, continued and finished
encoding       rows to shards, with work on the CPU while the device encodes
row_flags      the flags that say how a list of rows is read
shard_claims   which process makes which shard
"""
