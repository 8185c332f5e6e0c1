"""Latent diffusion from text: a network that turns noise into the latents of an image that its caption describes.

settings.py     what a recipe may say in `train.diffusion`; presets.py, samplers.py: names in it
text.py         captions → ids → states, by the encoders that towers.py and open_clip.py open
backbone.py     what a network says of itself; unet.py, dit.py, mmdit.py: one each; backbones.py: which one
model.py        network and text encoders as one trainable module
process.py      from data to noise: what is learnt at each step, and the scheduler that walks back
family.py       batches, loss, and the product: a folder that `DiffusionPipeline.from_pretrained` opens
"""

from capstan.training.models.diffusion.config import DiffusionSettings
from capstan.training.models.diffusion.family import DiffusionFamily

__all__ = ["DiffusionFamily", "DiffusionSettings"]
