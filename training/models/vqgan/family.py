"""The family `vqgan`: images → a trained VQModel of diffusers.

Loss = image loss (autoencoder.first_stage) + codebook · (‖sg[z] − e‖² + β ‖z − sg[e]‖²), z the latents and e their
codes (Esser et al. 2021, eq. 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import to_signed
from capstan.training.family import Batch, Metrics, finite, gradient_only
from capstan.training.models.autoencoder.codec import ImageCodec, latents_of
from capstan.training.models.autoencoder.first_stage import FirstStage, factor_of, load_weights
from capstan.training.models.vqgan.config import VqganSettings
from capstan.training.models.vqgan.model import Vqgan, codebook_loss, nearest, usage
from capstan.training.product import find_product, read_facts, write_facts

_BATCH = 16  # images encoded at once


class VqganFamily(FirstStage):
    """The family that trains a VQModel on the dataset's images."""

    name: ClassVar[str] = "vqgan"
    settings: ClassVar[type[Section]] = VqganSettings

    module: ClassVar[type[Vqgan]] = Vqgan

    train: VqganSettings

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train = train.settings
        self.model = self.module(self.build(self.train, self.size_of(assets)))
        self.codes = int(self.model.vq.config.num_vq_embeddings)
        self.set_up(assets, self.model.vq.config)
        if self.train.pretrained is None and self.train.start == "latents":
            self._start_from_latents()

    @staticmethod
    def build(settings: Any, size: int | None = None) -> Any:
        from diffusers import VQModel

        if settings.pretrained is not None:
            return load_vq(settings.pretrained, "train.vqgan.pretrained")
        codebook = {"num_vq_embeddings": settings.codes, "vq_embed_dim": settings.code_channels}
        return VQModel(**settings.shape(), **codebook)

    def start_from(self, product: Path) -> None:
        load_weights(self.model.vq, self.load(str(product), "train.init").state_dict(), product)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        images = to_signed(batch["pictures"])
        made, latents, codes, indices, abandoned = model(images.to(next(model.parameters()).dtype))
        loss, metrics = self.image_loss(made, images, self.model.last)
        codebook = codebook_loss(latents, codes, self.train.commitment)
        self.finite = {"the encoder": finite([latents]), "the decoder": finite([made])}
        perplexity, used = usage(indices, self.codes)
        more = {"codebook": codebook.detach(), "perplexity": perplexity, "codes_used": used}
        loss = loss + self.train.codebook * codebook + self.train.revival * gradient_only(abandoned)
        return loss, {**metrics, **more}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the model's folder; a VQModel's `scaling_factor` brings the images' latents to variance 1."""
        latents = self._latents(model, len(self.images))
        perplexity, used = usage(nearest(latents, model.codebook), self.codes)
        if hasattr(model.vq, "register_to_config"):  # diffusers'
            model.vq.register_to_config(scaling_factor=float(1 / latents.std()))
        model.vq.save_pretrained(folder)
        use = {"perplexity": float(perplexity), "used": float(used), "pictures": len(self.images)}
        facts = {"codes": self.codes, "codebook_use": use}
        write_facts(folder, family=self.name, size=self.size, factor=self.factor, **facts)

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> VqCodec:
        vq = cls.load(str(product), "RUN").to(device)
        size = read_facts(product).get("size") or vq.config.sample_size
        return VqCodec(cls.module(vq), int(size))

    @classmethod
    def load(cls, path: str, field: str) -> Any:
        """Load the model at `path`. Raises RecipeError naming `field`."""
        return load_vq(path, field)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"codes": self.codes}

    def _latents(self, model: torch.nn.Module, count: int) -> torch.Tensor:
        """Return latents [N, D, h, w] of the first `count` saved images."""
        with torch.no_grad():
            return torch.cat([model.vq.encode(part).latents for part in self.measured()[:count].split(_BATCH)])

    def _start_from_latents(self) -> None:
        """Set the codes to latents of the untrained encoder: codes far from all latents would never be chosen."""
        enough = -(-4 * self.codes // (self.size // self.factor) ** 2)  # images for four latents per code
        latents = self._latents(self.model, enough).movedim(1, -1).flatten(0, 2)
        chosen = torch.randperm(len(latents))[: self.codes]
        chosen = chosen.repeat(-(-self.codes // len(chosen)))[: self.codes]
        with torch.no_grad():
            self.model.table.copy_(latents[chosen])


class VqCodec(ImageCodec):
    """A model with a codebook: its codes can be read and written as tokens, and their use is worth measuring."""

    def __init__(self, model: Vqgan, size: int) -> None:
        super().__init__(model.vq, size)
        self.model = model.eval()
        self.codebook = model.codebook.detach()
        self.codes, self.channels = self.codebook.shape
        self.factor = factor_of(model.vq.config)

    @property
    def device(self) -> torch.device:
        return self.codebook.device

    def to(self, device: torch.device) -> None:
        self.codebook = self.model.to(device).codebook.detach()

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return the codes' indices [N, h, w] of images [N, 3, H, W] in −1 … 1, on the model's device."""
        with torch.no_grad():
            return nearest(self.model.vq.encode(images.to(self.codebook.dtype)).latents, self.codebook)

    def images(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the images [N, 3, H, W], about −1 … 1, of codes' indices [N, h, w]."""
        with torch.no_grad():
            return self.model.decode(self.codebook[tokens].movedim(-1, 1))

    def measures(self, images: np.ndarray, batch: int) -> Mapping[str, Mapping[str, float]]:
        """Return the perplexity of the codes over all latents, and the share of the codebook in use."""
        codebook = self.codebook
        indices = torch.cat([nearest(latents, codebook).cpu() for latents in latents_of(self.vae, images, batch)])
        perplexity, used = usage(indices, len(codebook))
        return {
            "perplexity": {"value": round(float(perplexity), 2), "chance": 1.0},
            "codes_used": {"value": round(float(used), 4), "chance": round(1 / len(codebook), 4)},
        }


def load_vq(path: str, field: str) -> Any:
    """Load the VQModel at `path`: a run, a product, or the vqvae/ of a pipeline. Raises RecipeError naming `field`."""
    from diffusers import VQModel

    folder = find_product(path, field)
    for part in ("vqvae", "movq"):
        folder = folder / part if (folder / part).is_dir() else folder
    try:
        return VQModel.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            field, f"{folder} is not a VQModel ({error})", "set a folder that diffusers can load"
        ) from None
