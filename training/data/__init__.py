"""A dataset → batches, in an order that depends only on the seed

tokenizer, transforms: captions and JPEGs → tensors
order, buckets: the order of the samples
shard_cache, shard_reader → dataset → mixture → loader: reading and prefetching
bad_samples: samples that cannot be read
"""
