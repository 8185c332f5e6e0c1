"""Captioned images → a text-to-image latent diffusion pipeline.

Order: presets → config → open_clip_text, load_text_encoder → text_encoders → backbone → unet, dit, mmdit → registry →
denoiser, drawer → family. Objectives, processes and samplers are those of training.models.noise.
"""

from capstan.training.models.diffusion.config import DiffusionSettings
from capstan.training.models.diffusion.family import DiffusionFamily

__all__ = ["DiffusionFamily", "DiffusionSettings"]
