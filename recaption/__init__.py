"""Captions written by a model, in the DALL-E 3 style, kept as layers next to the shards."""
