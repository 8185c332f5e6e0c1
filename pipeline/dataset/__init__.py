"""The dataset format: tars, manifest, and indexes of other tools.

shards: tars and the manifest, written and read
energon, indexes: files by which other tools find the shards
"""
