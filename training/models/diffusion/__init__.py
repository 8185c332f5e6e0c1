"""Captioned images → a text-to-image latent diffusion pipeline.

Order: presets → config (settings, without torch) → open_clip_text, load_text_encoder → text_encoders → backbone →
unet, dit, mmdit → registry → denoiser, drawer → family. Objectives, processes and samplers are those of
training.models.noise.
"""
