"""Style transfer by optimising the pixels: `capstan style`.

Order: features (two networks) → transfer (losses, L-BFGS) → stylise (files in, files out).
"""
