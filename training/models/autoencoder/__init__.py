"""Images → latents → images: diffusers' AutoencoderKL, a first stage.

Order: model → lpips, discriminator (losses) → first_stage (shared with vqgan) → family (settings, batches, product).
"""

from capstan.training.models.autoencoder.family import AutoencoderFamily, AutoencoderSettings

__all__ = ["AutoencoderFamily", "AutoencoderSettings"]
