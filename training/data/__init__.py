"""A dataset → batches, in an order that depends on the seed alone.

tokenizer, transforms: captions and JPEGs → tensors
order, buckets: which sample comes when
shard_cache, shard_reader → dataset → mixture → loader: reading ahead
"""
