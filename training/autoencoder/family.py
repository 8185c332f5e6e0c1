"""The family `autoencoder`: pictures of a dataset → a trained AutoencoderKL in diffusers' format.

Loss = reconstruction + edges · gradient difference + kl · KL per pixel value (Rombach et al. 2022, latent diffusion,
app. G, without the adversarial and perceptual terms).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from pipeline.config import Section
from pipeline.errors import RecipeError
from training.autoencoder.model import (
    Autoencoder,
    edge_difference,
    kl_divergence,
    lower_log_variance,
    standardise,
)
from training.config import TrainConfig
from training.family import Batch, Family, Metrics, Sample, Samples
from training.pixels import Crop, batch_of, picture_size, psnr, square, to_signed
from training.product import find_product, write_facts

_PICTURES = "pictures.npy"  # uint8 [N, size, size, 3]: those whose latents set the scale

Positive = Annotated[int, Field(ge=1)]


class AutoencoderSettings(Section):
    """`train.autoencoder`. The defaults are the shape of Stable Diffusion's autoencoder: 8× smaller, 4 channels."""

    pretrained: str | None = None  # start from this AutoencoderKL (a run, a product or a diffusers folder)
    size: Positive | None = None  # pixels, both sides; null: the stored pictures' shorter side
    crop: Crop = "center"  # how a picture becomes square
    flip: bool = False  # mirror half of the pictures
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 512, 512)  # one a level
    layers_per_block: Positive = 2
    latent_channels: Positive = 4
    norm_num_groups: Positive = 32
    mid_attention: bool = True  # self-attention at the lowest level
    down_block_types: list[str] | None = None  # diffusers' names; null: DownEncoderBlock2D everywhere
    up_block_types: list[str] | None = None  # diffusers' names; null: UpDecoderBlock2D everywhere
    reconstruction: Literal["l1", "l2"] = "l1"
    edges: Annotated[float, Field(ge=0)] = 0.0  # weight of the difference of gradients
    kl: Annotated[float, Field(ge=0)] = 1e-6  # weight of the KL divergence per pixel value
    log_variance: float = -6.0  # of the latents at the start; 0 is the prior's
    statistics: Positive = 128  # pictures from which the latents' scale is computed at the end

    @model_validator(mode="after")
    def _fits(self) -> AutoencoderSettings:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"block_out_channels {channels} does not divide by norm_num_groups")
        for name in ("down_block_types", "up_block_types"):
            blocks = getattr(self, name)
            if blocks is not None and len(blocks) != len(self.block_out_channels):
                raise ValueError(f"{name} must name one block for each of block_out_channels")
        return self


class AutoencoderFamily(Family):
    """Fits an AutoencoderKL to the dataset's pictures; needs no captions."""

    name: ClassVar[str] = "autoencoder"
    settings: ClassVar[type[Section]] = AutoencoderSettings
    captions: ClassVar[bool] = False

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Keep the pictures from which the latents' scale will be computed; with them, the size is decided."""
        settings: AutoencoderSettings = train.settings
        factor = factor_of(settings if settings.pretrained is None else build(settings).config)
        size = picture_size(samples, settings.size, factor, "train.autoencoder.size")
        count = min(settings.statistics, len(samples))
        indices = [number * len(samples) // count for number in range(count)]
        np.save(folder / _PICTURES, np.stack([square(samples.sample(index).jpeg, size) for index in indices]))

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train: AutoencoderSettings = train.settings
        vae = build(self.train)
        if self.train.pretrained is None:
            lower_log_variance(vae, self.train.log_variance)
        self.model = Autoencoder(vae)
        self.pictures = np.load(assets / _PICTURES, mmap_mode="r")
        self.size, self.factor = int(self.pictures.shape[1]), factor_of(vae.config)
        self.channels = int(vae.config.latent_channels)

    def start_from(self, product: Path) -> None:
        from diffusers import AutoencoderKL

        weights = AutoencoderKL.from_pretrained(product).state_dict()
        try:
            self.model.vae.load_state_dict(weights)
        except RuntimeError as error:
            raise RecipeError("train.init", f"{product} has another shape ({error})", "use its settings") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        return {"pictures": batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        pictures = to_signed(batch["pictures"])
        side = self.size // self.factor
        noise = torch.randn(len(pictures), self.channels, side, side, generator=draw, device=pictures.device)
        made, mean, log_variance = model(pictures.to(next(model.parameters()).dtype), noise)
        difference = made.float() - pictures
        reconstruction = difference.abs().mean() if self.train.reconstruction == "l1" else difference.square().mean()
        kl = kl_divergence(mean, log_variance).mean()
        loss = reconstruction + self.train.kl * kl / pictures[0].numel()
        if self.train.edges:
            loss = loss + self.train.edges * edge_difference(made, pictures)
        metrics = {
            "reconstruction": reconstruction.detach(),
            "psnr": psnr(made.detach(), pictures).mean(),
            "kl": kl.detach(),
            "latent_std": mean.detach().float().std(),
        }
        return loss, metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """An AutoencoderKL folder whose latents have mean 0 and variance 1 on the dataset's pictures."""
        vae = model.vae
        pictures = to_signed(torch.from_numpy(np.array(self.pictures)).permute(0, 3, 1, 2))
        mean, std = standardise(vae, pictures)
        vae.save_pretrained(folder, safe_serialization=True)
        scale = {"mean": mean.tolist(), "std": std.tolist(), "pictures": len(pictures)}
        write_facts(folder, family=self.name, size=self.size, factor=self.factor, latents_before=scale)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "size": self.size, "latents": [self.channels, *[self.size // self.factor] * 2]}


def build(settings: AutoencoderSettings) -> Any:
    """A new AutoencoderKL of the settings' shape, or the one that `pretrained` names."""
    from diffusers import AutoencoderKL

    if settings.pretrained is not None:
        return load_autoencoder(settings.pretrained, "train.autoencoder.pretrained")
    levels = len(settings.block_out_channels)
    return AutoencoderKL(
        down_block_types=tuple(settings.down_block_types or ["DownEncoderBlock2D"] * levels),
        up_block_types=tuple(settings.up_block_types or ["UpDecoderBlock2D"] * levels),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        latent_channels=settings.latent_channels,
        norm_num_groups=settings.norm_num_groups,
        mid_block_add_attention=settings.mid_attention,
        sample_size=settings.size or 512,
    )


def load_autoencoder(path: str, field: str) -> Any:
    """The AutoencoderKL at `path`: a run, a product, or the vae/ of a pipeline. Raises RecipeError naming `field`."""
    from diffusers import AutoencoderKL

    folder = find_product(path, field)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    try:
        return AutoencoderKL.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            field, f"{folder} is no AutoencoderKL ({error})", "name a folder that diffusers reads"
        ) from None


def factor_of(shape: Any) -> int:
    """How many pixels a latent spans along one side; `shape` is an AutoencoderKL's configuration, or the settings."""
    return int(2 ** (len(shape.block_out_channels) - 1))
