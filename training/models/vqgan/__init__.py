"""Images → codebook entries → images: VQGAN, a first stage (Esser et al. 2021).

Order: model (module, codebook losses, codebook use) → family (settings, batches, product).
"""

from capstan.training.models.vqgan.family import VqganFamily, VqganSettings

__all__ = ["VqganFamily", "VqganSettings"]
