"""Clips → latents → clips: diffusers' AutoencoderKLCogVideoX, a causal 3-D first stage (Yang et al. 2024, CogVideoX)

Order: config (settings, without torch) → model → encoder (latents ahead of training) → family (batches, product).
"""
