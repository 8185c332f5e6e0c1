"""Bytes of a file → the stored image, or a reason: the pixel contract.

sniff → jpeg, png: the format, and whether the file is whole
icc, resize, phash: colours, size, perceptual hash
decode: all of it
"""
