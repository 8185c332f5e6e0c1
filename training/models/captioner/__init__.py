"""Images and captions → CoCa, a model that writes captions.

Order: model (module, initialisation, losses) → initialize (`train.init`) → family (settings, batches, product).
"""

from capstan.training.models.captioner.family import CaptionerFamily, CaptionerSettings

__all__ = ["CaptionerFamily", "CaptionerSettings"]
