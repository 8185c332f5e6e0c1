"""Embeddings that a dataset keeps → the rows most like an image or a text"""
