"""The family `imagen`: captions → one stage of a cascade in pixels (Saharia et al. 2022)

    a base            caption ─frozen T5─▶ states ─▶ UNet ─▶ image
    one that enlarges the image made small, enlarged again, and noised with a level s that is drawn, is a second input:
                      z_s = √ᾱ_s up(down(x)) + √(1 − ᾱ_s) ε,  s ~ U{0 … S}       (noise conditioning augmentation, §2.3)

The network knows s. In drawing a user chooses it: more noise hides more of what the stage before got wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import to_signed
from capstan.training.family import Batch, Sample, Samples
from capstan.training.models.diffusion.config import EncoderSettings
from capstan.training.models.diffusion.load_text_encoder import load_text_encoder
from capstan.training.models.diffusion.text_encoders import TextEncoder, TextEncoders
from capstan.training.models.imagen.config import ImagenSettings
from capstan.training.models.imagen.copying import begin_as_input
from capstan.training.models.imagen.drawer import CascadeDrawer
from capstan.training.models.imagen.networks import BaseNet, SuperNet
from capstan.training.models.imagen.noising import NoisedImages, shrunk
from capstan.training.models.imagen.stages import (
    copy_stages,
    sampling_of,
    side_of,
    stage_name,
    stages_before,
    stages_of,
)
from capstan.training.models.noise.drawer import export_pipeline
from capstan.training.models.pixels.family import PixelFamily
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.models.pixels.settings import CHANNELS
from capstan.training.product import find_product, write_facts

_AFTER = "train.imagen.enlarge.after"


class ImagenFamily(PixelFamily):
    """The family that trains one stage; the product is the whole cascade up to it."""

    name: ClassVar[str] = "imagen"
    settings: ClassVar[type[Section]] = ImagenSettings
    train: ImagenSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the image size. Raises RecipeError if it does not enlarge the stage before's."""
        settings: ImagenSettings = train.settings
        size = cls.size_of(train, samples)
        if settings.enlarge is not None:
            small = side_of(stages_before(settings.enlarge.after, _AFTER)[-1])
            if size <= small:
                problem = f"is {size} pixels, and {settings.enlarge.after} already draws {small}"
                raise RecipeError("train.imagen.size", problem, "set a larger size")
        write_facts(folder, size=size)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        settings: ImagenSettings = train.settings
        enlarge, sampling = settings.enlarge, settings.sampling
        self.before = [] if enlarge is None else stages_before(enlarge.after, _AFTER)
        self.small = side_of(self.before[-1]) if self.before else 0
        self.noising = NoisedImages(enlarge.most if enlarge is not None else 0.0)
        process = PixelDdpm(
            settings.noise,
            sampler=sampling.sampler or "ddpm",
            variance=settings.variance,
            threshold=sampling.threshold,
        )
        backbone = (BaseNet if enlarge is None else SuperNet)(settings.unet, section=self.name)
        self.build(train, assets, process, backbone, self.text_encoder(train))
        if enlarge is not None and enlarge.start == "image":
            begin_as_input(self.model.net, CHANNELS)

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoders:
        """Return the frozen T5, whose states can be precomputed: the recipe's, or that of the stages before."""
        settings: ImagenSettings = train.settings
        field, model = "train.imagen.text", settings.text
        if settings.enlarge is not None:
            field, model = _AFTER, str(stages_before(settings.enlarge.after, _AFTER)[0])
        assert model is not None
        slot = BaseNet.slots[0]
        loaded = load_text_encoder(EncoderSettings(model=model), slot.name, slot.kind, slot.projected, field)
        return TextEncoders([TextEncoder(slot, *loaded)], own=False, field=field)

    def start_from(self, product: Path) -> None:
        super().start_from(stages_of(product)[-1])

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch = super().prepare(samples)
        if self.small:
            batch["small"] = shrunk(batch["pictures"], self.small)
        return batch

    def network_input(
        self, noisy: torch.Tensor, batch: Batch, draw: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.small:
            return noisy, None
        image, levels = self.noising.draw(to_signed(batch["small"]), self.size, draw)
        return torch.cat([noisy, image], dim=1), levels

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the stages before, and this one with the EMA's weights."""
        copy_stages(self.before, folder)
        parts = self.pipeline_parts(model)
        if self.before:
            parts["image_noising_scheduler"] = NoisedImages.scheduler()
        own = folder / stage_name(len(self.before))
        self.backbone.pipeline(parts).save_pretrained(own, safe_serialization=True)
        sampling = self.train.sampling.model_dump(exclude={"sampler", "threshold"})
        if not self.before:
            del sampling["level"]
        earlier = []
        if self.train.enlarge is not None:
            earlier = sampling_of(find_product(self.train.enlarge.after, _AFTER))
        write_facts(folder, family=self.name, size=self.size, sampling=sampling, stages=[*earlier, sampling])

    @classmethod
    def open(cls, product: Path, device: torch.device) -> CascadeDrawer:
        return CascadeDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write each stage's pipeline into a folder of its own: base, super, …"""
        drawer = CascadeDrawer(product, torch.device("cpu"))
        if sampler is not None:
            drawer.use_sampler(sampler)
        written = [
            export_pipeline(pipeline, folder / stage_name(number), precision)
            for number, pipeline in enumerate(drawer.pipelines)
        ]
        return " and ".join(written)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the pipelines read."""
        self.warn_of_cut_texts(samples, "write shorter captions: the pipelines read no more")

    def describe(self) -> dict[str, Any]:
        facts = super().describe() | {"stage": stage_name(len(self.before))}
        return facts | ({"enlarges": self.small} if self.small else {})
