"""Assets and image loss that all first stages share.

    image loss    reconstruction + edges · gradient difference + perceptual · LPIPS
    adversarial   λ · loss against a discriminator (discriminator.py), from its start step on

Esser et al. 2021 (VQGAN, §3.1–3.2) and Rombach et al. 2022 (latent diffusion, app. G) train with these terms.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import batch_of, image_size, psnr, square, to_signed
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, gradient_only
from capstan.training.models.autoencoder.config import ImageStageSettings
from capstan.training.models.autoencoder.discriminator import PatchAdversary
from capstan.training.models.autoencoder.lpips import Lpips, load_lpips
from capstan.training.models.autoencoder.model import edge_difference

_IMAGES: Final = "pictures.npy"  # uint8 [N, size, size, 3]: the images that latents are measured on


class FirstStage(Family):
    """A family whose model maps images to latents and back; needs no captions."""

    captions: ClassVar[bool] = ImageStageSettings.captions

    train: ImageStageSettings
    size: int  # pixels, both sides of the images
    factor: int  # pixels per latent along one side
    perceptual: Lpips | None = None
    adversary: PatchAdversary | None = None

    @staticmethod
    @abstractmethod
    def build(settings: Any, size: int | None = None) -> Any:
        """Return a new model of the settings' shape for images of `size`, or the one that `pretrained` names."""

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module | None:
        """Return a new first stage of the settings' shape; None if `pretrained` names one."""
        model: torch.nn.Module | None = cls.build(train.settings) if train.settings.pretrained is None else None
        return model

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Save the images that latents are measured on; this fixes the image size."""
        settings: ImageStageSettings = train.settings
        if settings.perceptual is not None:
            load_lpips(settings.perceptual, f"train.{cls.name}.perceptual")
        factor = factor_of(settings if settings.pretrained is None else cls.build(settings).config)
        size = image_size(samples, settings.size, factor, f"train.{cls.name}.size")
        if settings.discriminator is not None:
            _refuse_small(size, settings.discriminator.layers, f"train.{cls.name}.discriminator.layers")
        count = min(settings.statistics, len(samples))
        indices = [number * len(samples) // count for number in range(count)]
        np.save(folder / _IMAGES, np.stack([square(samples.sample(index).jpeg, size) for index in indices]))

    def set_up(self, assets: Path, config: Any) -> None:
        """Finish __init__ once `self.train` and `self.model` are set; `config` is the model's."""
        self.images = np.load(assets / _IMAGES, mmap_mode="r")
        self.size, self.factor = int(self.images.shape[1]), factor_of(config)
        self.channels = int(config.latent_channels)
        if self.train.perceptual is not None:
            self.perceptual = load_lpips(self.train.perceptual, f"train.{self.name}.perceptual")
            self.frozen = [self.perceptual]
        if self.train.discriminator is not None:
            self.adversary = PatchAdversary(self.train.discriminator)

    @staticmethod
    def size_of(assets: Path) -> int:
        """Return the side of the images in pixels, which `make_assets` fixed."""
        return int(np.load(assets / _IMAGES, mmap_mode="r").shape[1])

    def measured(self) -> torch.Tensor:
        """Return the images that latents are measured on: float32 [N, 3, size, size] in −1 … 1."""
        return to_signed(torch.from_numpy(np.array(self.images)).permute(0, 3, 1, 2))

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        return {"pictures": batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip)}

    def image_loss(
        self, made: torch.Tensor, images: torch.Tensor, last: torch.Tensor, reconstruction: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the loss of the `made` images [B, 3, H, W] and metrics; `last` is the decoder's last weight.

        `reconstruction` replaces the mean error where a family has another one.
        """
        if reconstruction is None:
            difference = made.float() - images
            l1 = self.train.reconstruction == "l1"
            reconstruction = difference.abs().mean() if l1 else difference.square().mean()
        metrics = {
            "reconstruction": reconstruction.detach(),
            "psnr": psnr(made.detach(), images).mean(),
        }
        loss = reconstruction
        if self.train.edges:
            loss = loss + self.train.edges * edge_difference(made, images)
        if self.perceptual is not None and self.train.perceptual is not None:
            perceptual = self.perceptual(made, images).mean()
            loss = loss + self.train.perceptual.weight * perceptual
            metrics["perceptual"] = perceptual.detach()
        if self.adversary is None:
            return loss, metrics
        adversarial, more = self.adversary.adversarial_loss(made, images, loss, last)
        return loss + gradient_only(adversarial), {**metrics, **more}

    def describe(self) -> dict[str, Any]:
        facts = {**super().describe(), "size": self.size, "latents": [self.channels, *[self.size // self.factor] * 2]}
        if self.adversary is not None:
            facts["discriminator"] = sum(parameter.numel() for parameter in self.adversary.model.parameters())
        return facts


def load_weights(model: torch.nn.Module, weights: Any, product: Path) -> None:
    """Load another run's weights into `model`. Raises RecipeError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RecipeError(
            "train.init", f"{product} has a different shape ({error})", "use the settings of that run"
        ) from None


def factor_of(shape: Any) -> int:
    """Return the pixels per latent along one side; `shape` is a model's configuration or the settings."""
    patch = getattr(shape, "patch_size", None)  # of a transformer
    return int(2 ** (len(shape.block_out_channels) - 1) if patch is None else patch)


def _refuse_small(size: int, layers: int, field: str) -> None:
    """Raise RecipeError if `layers` halvings and two more convolutions of a pixel each leave nothing of `size`."""
    if size < 3 * 2**layers:
        raise RecipeError(field, f"{layers} layers leave nothing of {size} pixels", "use fewer, e.g. layers: 1")
