"""Captions → images in pixels, in stages: Imagen (Saharia et al. 2022), a base and what enlarges its images.

Order: config (settings, without torch) → stages (folders of a cascade), noising → networks →
drawer → family. Noise, variance
and loss are those of training.models.pixels.
"""
