"""The family `dvae`: images → a discrete VAE, which is a VQModel of diffusers (Ramesh et al. 2021, section 2.1).

    loss = −ln p(image | codes) + β · KL(q(codes | image) ‖ uniform) / pixel values        (the ELBO at β = 1)

Codes are drawn by Gumbel-softmax (model.py), whose temperature falls, while β rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import to_signed
from capstan.training.distributed.step import Step
from capstan.training.draws import uniform
from capstan.training.family import Batch, Metrics, finite, gradient_only
from capstan.training.models.autoencoder.first_stage import load_weights
from capstan.training.models.dvae.config import DvaeSettings
from capstan.training.models.dvae.model import Dvae, farthest, gumbel, kl_from_uniform, logit_laplace, scheduled
from capstan.training.models.vqgan.family import VqCodec, VqganFamily, load_vq
from capstan.training.models.vqgan.model import Vqgan, usage
from capstan.training.product import read_facts

_APART = 4.0  # mean squared distance of a first code to those before it: odds of e⁻⁴ to be mistaken for one of them
_POOL = 16  # latents per code that first codes are chosen from


class DvaeFamily(VqganFamily):
    """The family that trains a discrete VAE on the dataset's images."""

    name: ClassVar[str] = "dvae"
    settings: ClassVar[type[Section]] = DvaeSettings
    module: ClassVar[type[Vqgan]] = Dvae

    train: DvaeSettings  # type: ignore[assignment]

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        super().__init__(train, assets)
        self._set_schedules(0)

    @staticmethod
    def build(settings: Any, size: int | None = None) -> Any:
        if settings.pretrained is not None:
            return load_vq(settings.pretrained, "train.dvae.pretrained")
        return VqganFamily.build(settings, size)

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:
        self._set_schedules(step.number)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        images = to_signed(batch["pictures"])
        side = self.size // self.factor
        noise = gumbel(uniform((len(images), side, side, self.codes), draw))
        found = model(images.to(next(model.parameters()).dtype), noise, self.temperature)
        given = logit_laplace(found.images, found.spread, images) if self.train.reconstruction == "laplace" else None
        loss, metrics = self.image_loss(found.images, images, self.model.last, given)
        kl = kl_from_uniform(found.logits).mean()
        self.finite = {"the encoder": finite([found.latents]), "the decoder": finite([found.images, found.spread])}
        perplexity, used = usage(found.logits.argmax(-1), self.codes)
        schedules = {"temperature": self.temperature, "kl_weight": self.kl_weight}
        more = {"kl": kl.detach(), "perplexity": perplexity, "codes_used": used, **schedules}
        # DDP waits for every weight's gradient, and only the likelihood uses the spread.
        loss = loss + self.kl_weight * kl / images[0].numel() + 0 * found.spread.sum()
        return loss + self.train.revival * gradient_only(found.abandoned), {**metrics, **more}

    def start_from(self, product: Path) -> None:
        load_weights(self.model, Dvae(self.load(str(product), "train.init")).state_dict(), product)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write a VQModel folder: decoding takes the nearest code, and draws no spread."""
        super().save(Vqgan(model.plain()), folder)  # type: ignore[operator]

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> VqCodec:
        vq = cls.load(str(product), "RUN").to(device)
        return VqCodec(Vqgan(vq), int(read_facts(product).get("size", vq.config.sample_size)))

    def _set_schedules(self, number: int) -> None:
        self.temperature = scheduled(**self.train.temperature.model_dump(), step=number)
        self.kl_weight = scheduled(**self.train.kl.model_dump(), step=number)

    def _start_from_latents(self) -> None:
        """Take codes from the untrained encoder's latents, and scale both so that codes can be told apart.

        The codes lie as far from each other as latents do: most patches of an image are alike. The noise of the
        relaxation has a scale of its own (a standard deviation of π/√6): of codes that lie much closer to each other it
        chooses at random, and most are lost before the encoder has learnt anything.
        """
        latents = self._latents(self.model, len(self.images)).movedim(1, -1).flatten(0, 2)
        codes, apart = farthest(latents[torch.randperm(len(latents))[: _POOL * self.codes]], self.codes)
        conv = self.model.vq.quant_conv
        with torch.no_grad():
            center, scale = codes.mean(0), (_APART / apart.clamp(min=1e-12)).sqrt()
            self.model.table.copy_((codes - center) * scale)
            conv.weight *= scale
            conv.bias.sub_(center).mul_(scale)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"reconstruction": self.train.reconstruction}
