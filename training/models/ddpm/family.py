"""The family `ddpm`: images → a model that draws pixels from noise, with or without text (Ho et al. 2020)"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.family import Samples
from capstan.training.models.ddpm.backbones import TextNet, UnconditionalNet
from capstan.training.models.ddpm.config import DdpmSettings
from capstan.training.models.ddpm.drawer import PixelDrawer, add_code
from capstan.training.models.diffusion.text_encoders import TextEncoders, new_encoders, open_encoders
from capstan.training.models.noise.drawer import export_pipeline
from capstan.training.models.pixels.family import PixelFamily
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.product import write_facts

_TOKENIZER = "tokenizer"


class DdpmFamily(PixelFamily):
    """The family that trains a UNet on pixels, and a text encoder with it unless a frozen one is given."""

    name: ClassVar[str] = "ddpm"
    settings: ClassVar[type[Section]] = DdpmSettings
    train: DdpmSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the image size, and the tokenizer of a text encoder that is trained."""
        settings: DdpmSettings = train.settings
        size = cls.size_of(train, samples)
        if settings.text is not None and settings.text.pretrained is None:
            Tokenizer.train(samples.captions(), settings.text.vocab_size).save(folder / _TOKENIZER)
        write_facts(folder, size=size)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        settings: DdpmSettings = train.settings
        process = PixelDdpm(settings.noise, sampler=settings.sampler, variance=settings.variance)
        kind = UnconditionalNet if settings.text is None else TextNet
        backbone = kind(settings.unet, doubled=settings.variance == "learned", section=self.name)
        text = self.text_encoder(train)
        if text is None and settings.text is not None:
            text = new_encoders(backbone.slots, settings.text, assets / _TOKENIZER)
        self.build(train, assets, process, backbone, text or TextEncoders([], own=True))

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoders | None:
        """Return the frozen encoder, whose states can be precomputed; None if it is trained, or there is none."""
        settings: DdpmSettings = train.settings
        if settings.text is None or settings.text.pretrained is None:
            return None
        return open_encoders(TextNet.slots, settings.text, cls.name)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a diffusers pipeline with the EMA's weights."""
        self.backbone.pipeline(self.pipeline_parts(model)).save_pretrained(folder, safe_serialization=True)
        sampling = self.train.sampling.model_dump(exclude={"sampler"})
        write_facts(folder, family=self.name, size=self.size, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> PixelDrawer:
        return PixelDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write a DDPMPipeline; with text, a pipeline whose code lies in the folder."""
        drawer = PixelDrawer(product, torch.device("cpu"))
        if sampler is not None:
            drawer.use_sampler(sampler)
        written = export_pipeline(drawer.pipeline, folder, precision)
        if drawer.prompted:
            add_code(folder)
        return written

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        self.warn_of_cut_texts(samples, "raise train.ddpm.text.length in a new run, or write shorter captions")
