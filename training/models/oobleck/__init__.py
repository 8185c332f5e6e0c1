"""Sounds → latents → sounds: diffusers' AutoencoderOobleck, a first stage (Evans et al. 2024, Stable Audio)"""
