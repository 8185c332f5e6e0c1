"""Captions → sounds: latent diffusion with a transformer, given text and timing (Evans et al. 2024, Stable Audio)"""
