"""Captioned images → a text-to-image latent diffusion pipeline.

Order: presets, schedulers → config → open_clip_text, load_text_encoder → text_encoders → backbone → unet, dit, mmdit →
registry → denoiser → objectives, process → family.
"""

from capstan.training.models.diffusion.config import DiffusionSettings
from capstan.training.models.diffusion.family import DiffusionFamily

__all__ = ["DiffusionFamily", "DiffusionSettings"]
