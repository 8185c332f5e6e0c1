"""Images → images from noise, in pixels: reverse diffusion (Ho et al. 2020), with or without text.

Order: config (settings, without torch) → pipeline (runs without Capstan), backbones → drawer → family. Noise, variance
and loss are those of training.models.pixels.
"""
