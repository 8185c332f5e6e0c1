"""Images and captions → latents and text embeddings, computed once

files: the storage format
latents, text_embeddings: the unit map over shards
"""
