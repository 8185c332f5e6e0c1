"""Captioned clips → an image model that moves: motion modules between the layers of a trained UNet (AnimateDiff).

Order: config (settings, without torch) → motion (the network, and what it starts from) → encoder (clips' latents) →
drawer → family (batches, loss, product).
"""
