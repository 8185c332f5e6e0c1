"""Latent diffusion from text: a UNet that turns noise into the latents of a picture that its caption describes.

settings.py   what a recipe may say in `train.diffusion`
model.py      UNet and text encoder as one trainable module
process.py    from data to noise: what is learnt at each step, and the scheduler that walks back
family.py     batches, loss, and the product: a folder that `DiffusionPipeline.from_pretrained` opens
"""

from training.diffusion.family import DiffusionFamily
from training.diffusion.settings import DiffusionSettings

__all__ = ["DiffusionFamily", "DiffusionSettings"]
