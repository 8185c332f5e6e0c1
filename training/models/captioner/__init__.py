"""CoCa, trained to write captions: on web captions first, then on short and descriptive ones.

model.py    the trainable module over open_clip's CoCa, its initialisation and its losses
family.py   settings, batches and the product: a folder that open_clip and the recaption engine `coca` open
"""

from capstan.training.models.captioner.family import CaptionerFamily, CaptionerSettings

__all__ = ["CaptionerFamily", "CaptionerSettings"]
