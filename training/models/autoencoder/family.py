"""The family `autoencoder`: images → a trained AutoencoderKL of diffusers.

Loss = image loss (first_stage) + kl · KL per pixel value (Rombach et al. 2022, latent diffusion, app. G).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import to_signed
from capstan.training.draws import normal
from capstan.training.family import Batch, Metrics, finite
from capstan.training.models.autoencoder.codec import ImageCodec
from capstan.training.models.autoencoder.config import AutoencoderSettings
from capstan.training.models.autoencoder.first_stage import FirstStage, factor_of, load_weights
from capstan.training.models.autoencoder.model import Autoencoder, kl_divergence, lower_log_variance, standardise
from capstan.training.product import find_product, read_facts, write_facts

__all__ = ["AutoencoderFamily", "build", "factor_of", "load_autoencoder"]


class AutoencoderFamily(FirstStage):
    """The family that trains an AutoencoderKL on the dataset's images."""

    name: ClassVar[str] = "autoencoder"
    settings: ClassVar[type[Section]] = AutoencoderSettings

    train: AutoencoderSettings

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train = train.settings
        vae = build(self.train)
        if self.train.pretrained is None:
            lower_log_variance(vae, self.train.log_variance)
        self.model = Autoencoder(vae)
        self.set_up(assets, vae.config)

    @staticmethod
    def build(settings: Any, size: int | None = None) -> Any:
        return build(settings)

    def start_from(self, product: Path) -> None:
        from diffusers import AutoencoderKL

        load_weights(self.model.vae, AutoencoderKL.from_pretrained(product).state_dict(), product)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        images = to_signed(batch["pictures"])
        side = self.size // self.factor
        noise = normal((len(images), self.channels, side, side), draw)
        made, mean, log_variance = model(images.to(next(model.parameters()).dtype), noise)
        loss, metrics = self.image_loss(made, images, self.model.vae.decoder.conv_out.weight)
        kl = kl_divergence(mean, log_variance).mean()
        self.finite = {"the encoder": finite([mean, log_variance]), "the decoder": finite([made])}
        loss = loss + self.train.kl * kl / images[0].numel()
        return loss, {**metrics, "kl": kl.detach(), "latent_std": mean.detach().float().std()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write an AutoencoderKL folder whose latents have mean 0 and variance 1 on the dataset's images."""
        vae, images = model.vae, self.measured()
        mean, std = standardise(vae, images)
        vae.save_pretrained(folder, safe_serialization=True)
        scale = {"mean": mean.tolist(), "std": std.tolist(), "pictures": len(images)}
        write_facts(folder, family=self.name, size=self.size, factor=self.factor, latents_before=scale)

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> ImageCodec:
        vae = load_autoencoder(str(product), "RUN").to(device)
        return ImageCodec(vae, int(read_facts(product).get("size", vae.config.sample_size)))


def build(settings: AutoencoderSettings) -> Any:
    """Return a new AutoencoderKL of the settings' shape, or the one that `pretrained` names."""
    from diffusers import AutoencoderKL

    if settings.pretrained is not None:
        return load_autoencoder(settings.pretrained, "train.autoencoder.pretrained")
    return AutoencoderKL(**settings.shape())


def load_autoencoder(path: str, field: str) -> Any:
    """Load the AutoencoderKL at `path`: a run, a product, or the vae/ of a pipeline. Raises RecipeError naming `field`.

    A VQModel is refused: diffusers' StableDiffusionPipeline cannot decode with one.
    """
    from diffusers import AutoencoderKL

    folder = find_product(path, field)
    if (folder / "vae").is_dir():
        folder = folder / "vae"
    if class_of(folder) == "VQModel":
        problem = f"{folder} is a VQModel, which no text-to-image pipeline of diffusers can decode with"
        raise RecipeError(field, problem, "use an AutoencoderKL, e.g. a run of model: autoencoder")
    try:
        return AutoencoderKL.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            field, f"{folder} is not an AutoencoderKL ({error})", "set a folder that diffusers can load"
        ) from None


def class_of(folder: Path) -> str:
    """Return the diffusers class named in the folder's config.json, or ""."""
    config = folder / "config.json"
    return str(json.loads(config.read_text(encoding="utf-8")).get("_class_name", "")) if config.is_file() else ""
