"""File bytes → the stored image, or a failure reason: the pixel contract.

sniff → jpeg, png: detect the format; check that the file is complete
icc, resize, phash: colours, size, perceptual hash
decode: all of the above in order
"""
