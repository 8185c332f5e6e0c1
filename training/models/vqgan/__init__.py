"""The first stage with a codebook: VQGAN (Esser et al. 2021), from images to entries of a codebook and back.

model.py    the trainable module, its codebook's loss, and how much of the codebook is used
family.py   settings, batches and the product: a folder that `VQModel.from_pretrained` opens
"""

from capstan.training.models.vqgan.family import VqganFamily, VqganSettings

__all__ = ["VqganFamily", "VqganSettings"]
