"""Training data: pictures and captions as ids and codes, in files, in order, in batches.

feature_set  its items, and the order of an epoch
shards     a feature set's files and their index
parts      a shard's file, read part by part and checked
foreign    features that other tools extracted
mixing     one stream of items from several sets
packing    several items in one row
rows       stored features as rows of a batch
batches    the batch of each step
prefetch   batches prepared ahead by a thread
"""
