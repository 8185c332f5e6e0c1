"""Images → codes of a first stage, computed once before training (`capstan encode`)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import Size
from capstan.training.models.autoencoder.encoder import digest_of, signed_images
from capstan.training.models.vqgan.family import VqCodec

_MOST: Final = 2**15  # codes that int16 can number


class TokenEncoder:
    """A first stage with a codebook, which the recipe's key `field` names; a sample's latent is its codes [h, w]."""

    def __init__(self, codec: VqCodec, field: str) -> None:
        if codec.codes > _MOST:
            problem = f"has {codec.codes} codes, and tokens are stored as numbers below {_MOST}"
            raise RecipeError(field, problem, "use a first stage with fewer codes")
        self.codec, self.factor, self.part = codec, codec.factor, f"the first stage ({field})"

    def identity(self) -> dict[str, Any]:
        weights = digest_of(self.codec.model.state_dict(), ("",))
        return {"weights": weights, "crop": "center", "factor": self.factor, "format": "codes"}

    def to(self, device: torch.device) -> None:
        self.codec.to(device)

    def __call__(self, files: Sequence[bytes], size: Size) -> torch.Tensor:
        return self.codec.tokens(signed_images(files, size, self.codec.device))
