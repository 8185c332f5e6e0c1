"""A dataset and a layer → shards without all captions, and the captions that they can reuse

contents: what a caption is made of
existing: images and captions that exist, brought together on workers
incomplete: the shards, and how much is left to do
"""
