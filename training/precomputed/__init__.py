"""Images and captions → latents and text embeddings, computed once.

files: how they are stored
latents, text_embeddings: the unit map over shards
"""
