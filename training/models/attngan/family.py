"""The family `attngan`: captioned images → generators that attend to words (Xu et al. 2018).

    loss = adversarial (discriminators.py) + kl · KL of the augmented sentence + matching · DAMSM loss (damsm/losses.py)

A trained DAMSM encodes the texts and judges the images; its text encoder becomes a part of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import batch_of, image_size, to_signed
from capstan.training.distributed.step import Step
from capstan.training.drawing.drawer import Kind
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite, gradient_only
from capstan.training.models.attngan.config import AttnganSettings
from capstan.training.models.attngan.discriminators import JudgeAdversary, Shown
from capstan.training.models.attngan.drawer import AttnganDrawer
from capstan.training.models.autoencoder.first_stage import load_weights
from capstan.training.models.damsm.config import DamsmSettings
from capstan.training.models.damsm.losses import matched, share_gradients
from capstan.training.models.damsm.modeling_attngan import AttnGANConfig, AttnGANModel, DamsmModel, Generator
from capstan.training.models.own_model import export_own, load_own
from capstan.training.product import find_product, read_facts, write_facts

_DAMSM = "damsm"  # folder of the assets


class AttnganFamily(Family):
    """The family that trains AttnGAN's generators against its discriminators."""

    name: ClassVar[str] = "attngan"
    settings: ClassVar[type[Section]] = AttnganSettings
    draws: ClassVar[Kind | None] = "image"

    train: AttnganSettings
    adversary: JudgeAdversary

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Copy the DAMSM, so that the run does not change with it."""
        settings: AttnganSettings = train.settings
        judge = load_own(DamsmModel, settings.damsm, "train.attngan.damsm")
        _check_side(int(judge.config.image_size), settings)
        image_size(samples, int(judge.config.image_size), 1, "train.attngan.damsm")
        judge.save_pretrained(folder / _DAMSM)
        product = find_product(settings.damsm, "train.attngan.damsm")
        write_facts(folder, matching=read_facts(product).get("matching", {}))

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train = train.settings
        self.judge = load_own(DamsmModel, assets / _DAMSM, "train.attngan.damsm").requires_grad_(False)
        self.frozen = [self.judge]
        self.gammas = DamsmSettings(**read_facts(assets)["matching"])
        shape, known = self.train, self.judge.config
        self.size = int(known.image_size)
        self.config = AttnGANConfig(
            known.vocabulary,
            words=known.words,
            text_channels=known.channels,
            image_size=self.size,
            **shape.model_dump(include={"noise", "condition", "channels", "stages", "generators", "blocks"}),
        )
        self.model = Generator(self.config)
        sides = [self.size >> level for level in reversed(range(shape.generators))]
        self.adversary = JudgeAdversary(shape.discriminator, sides, known.channels)

    def start_from(self, product: Path) -> None:
        load_weights(self.model, load_own(AttnGANModel, product, "train.init").generator.state_dict(), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Return images, words and noise: it belongs to the sample, as it is needed before the loss (`begin_step`)."""
        size = self.train.noise + self.train.condition
        noise = [np.random.default_rng([sample.seed, 1]).standard_normal(size, np.float32) for sample in samples]
        return {
            "pictures": batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip),
            "ids": self.judge.text.ids([sample.text for sample in samples]),
            "noise": torch.from_numpy(np.stack(noise)),
        }

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:
        with torch.no_grad():
            for part in parts:
                part["words"], part["sentences"] = self.judge.text(part["ids"])
            mine = torch.cat([part["sentences"] for part in parts])
            shifted = step.gather(mine).roll(-1, 0)[step.rank * len(mine) : (step.rank + 1) * len(mine)]
        for part, others in zip(parts, shifted.chunk(len(parts)), strict=True):
            part["others"] = others
        if self.train.matching:
            share_gradients(parts, step, lambda part: self._judged(part, self._made(model, part)[0][-1]), self.gammas)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        images, mean, log_variance = self._made(model, batch)
        self.finite = {"the generators": finite(images)}
        divergence = kl_divergence(mean.float(), log_variance.float())
        loss, metrics = self.train.kl * divergence, {"kl": divergence.detach()}
        if self.train.matching:
            features = self._judged(batch, images[-1])
            mask = features.pop("mask")
            of_words, found = matched(features, mask, batch, self.gammas)
            loss = loss + self.train.matching * of_words
            metrics |= {"words": found.words, "sentences": found.sentences, "matched": found.accuracy}
        if self.adversary.active:
            real = to_signed(batch["pictures"])
            reals = [F.adaptive_avg_pool2d(real, image.shape[-1]) for image in images]
            shown = Shown(images, reals, batch["sentences"].float(), batch["others"].float())
            adversarial, more = self.adversary.adversarial_loss(shown)
            loss, metrics = loss + gradient_only(adversarial), {**metrics, **more}
        return loss, metrics

    def _made(self, model: torch.nn.Module, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Return images from small to large, and mean and log-variance of the condition."""
        dtype = next(model.parameters()).dtype
        texts = batch["words"].to(dtype), batch["sentences"].to(dtype), batch["ids"] > 0
        made = model(*texts, batch["noise"].to(dtype))
        return made.images, made.mean, made.log_variance

    def _judged(self, batch: Batch, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the DAMSM loss compares: the drawn images, and their own texts."""
        regions, whole = self.judge.image(images.to(self.judge.dtype))
        texts = {"words": batch["words"], "sentences": batch["sentences"], "mask": batch["ids"] > 0}
        return {"regions": regions, "images": whole, **texts}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the generators and the text encoder as one model."""
        whole = AttnGANModel(self.config)
        whole.generator.load_state_dict(model.state_dict())
        whole.text.load_state_dict(self.judge.text.state_dict())
        whole.save_pretrained(folder)
        write_facts(folder, family=self.name, size=self.size)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> AttnganDrawer:
        return AttnganDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the model with its code, which transformers' AutoModel opens."""
        return export_own(AttnGANModel, product, folder, precision=precision, sampler=sampler)

    def describe(self) -> dict[str, Any]:
        judges = sum(parameter.numel() for parameter in self.adversary.model.parameters())
        return super().describe() | {"size": self.size, "discriminators": judges}


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Return KL(N(mean, variance) ‖ N(0, 1)) per value, the mean over samples and values."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def _check_side(size: int, settings: AttnganSettings) -> None:
    """Raise RecipeError if the first stage, or the smallest image, would be smaller than 4 pixels."""
    first = size >> (settings.stages - 1)
    if first < 4 or size % 2 ** (settings.stages - 1) or first & (first - 1):
        problem = f"{settings.stages} stages for {size} pixels start at {size / 2 ** (settings.stages - 1):g}"
        raise RecipeError("train.attngan.stages", problem, "use a number that starts at 4, 8, 16, …")
    if size >> (settings.generators - 1) < 8:
        problem = f"the smallest of {settings.generators} images has less than 8 pixels"
        raise RecipeError("train.attngan.generators", problem, "use fewer, e.g. generators: 2")
