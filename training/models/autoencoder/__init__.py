"""The first stage of latent diffusion: a KL autoencoder (diffusers' AutoencoderKL) from images to latents and back.

model.py    the trainable module, its loss, and latents brought to mean 0 and variance 1
family.py   settings, batches and the product: a folder that `AutoencoderKL.from_pretrained` opens
"""

from capstan.training.models.autoencoder.family import AutoencoderFamily, AutoencoderSettings

__all__ = ["AutoencoderFamily", "AutoencoderSettings"]
