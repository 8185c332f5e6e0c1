"""The family `vitvqgan`: images → a ViT-VQGAN, vision transformers on both sides of a codebook (Yu et al. 2022).

The loss is that of the family `vqgan`, on latents and codes of length 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.models.own_model import export_own, load_own
from capstan.training.models.vitvqgan.config import VitvqganSettings
from capstan.training.models.vitvqgan.modeling_vitvqgan import ViTVQConfig, ViTVQModel
from capstan.training.models.vqgan.family import VqganFamily
from capstan.training.models.vqgan.model import Vqgan


class VitVqgan(Vqgan):
    """ViT-VQGAN whose forward returns everything that the loss needs."""

    @property
    def table(self) -> torch.nn.Parameter:
        return self.vq.codes.weight  # type: ignore[return-value]

    @property
    def codebook(self) -> torch.Tensor:
        return F.normalize(self.table, dim=-1)

    @property
    def last(self) -> torch.Tensor:
        return self.vq.to_pixels[-1].weight  # type: ignore[index,return-value]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self.vq.decode_codes(codes)  # type: ignore[operator,no-any-return]


class VitvqganFamily(VqganFamily):
    """The family that trains a ViT-VQGAN on the dataset's images."""

    name: ClassVar[str] = "vitvqgan"
    settings: ClassVar[type[Section]] = VitvqganSettings
    module: ClassVar[type[Vqgan]] = VitVqgan

    train: VitvqganSettings  # type: ignore[assignment]

    @staticmethod
    def build(settings: Any, size: int | None = None) -> ViTVQModel:
        if settings.pretrained is None:
            config = ViTVQConfig(
                image_size=size or settings.size or 256,
                patch_size=settings.patch_size,
                encoder=settings.encoder.model_dump(),
                decoder=settings.decoder.model_dump(),
                num_vq_embeddings=settings.codes,
                latent_channels=settings.code_channels,
            )
            return ViTVQModel(config)
        model = load_own(ViTVQModel, settings.pretrained, "train.vitvqgan.pretrained")
        if size not in (None, model.config.image_size):
            problem = f"{size} pixels, and the pretrained model knows {model.config.image_size}"
            raise RecipeError("train.vitvqgan.size", problem, f"set size: {model.config.image_size}")
        return model

    @classmethod
    def load(cls, path: str, field: str) -> ViTVQModel:
        return load_own(ViTVQModel, path, field)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the model with its code, which transformers' AutoModel opens."""
        return export_own(ViTVQModel, product, folder, precision=precision, sampler=sampler)
