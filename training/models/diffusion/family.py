"""The family `diffusion`: captioned images → a diffusers pipeline.

image ─frozen autoencoder─▶ latent ─process─▶ noisy latent, time ─┐
caption ─tokenizers─▶ ids ─(some emptied)─▶ text encoders ──────────┴▶ backbone ─▶ prediction; loss = squared error
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.recaption.upsample import Style
from capstan.training.config import TrainConfig
from capstan.training.data.buckets import sizes_of
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.data.transforms import batch_of, conditions_of, to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.autoencoder.encoder import KlEncoder
from capstan.training.models.autoencoder.family import factor_of, load_autoencoder
from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.diffusion.config import DiffusionSettings
from capstan.training.models.diffusion.denoiser import Denoiser
from capstan.training.models.diffusion.drawer import LatentDrawer
from capstan.training.models.diffusion.registry import backbone_of
from capstan.training.models.diffusion.text_encoders import (
    TextEncoders,
    new_encoders,
    open_encoders,
    unread_encoders,
)
from capstan.training.models.load_parts import load_parts
from capstan.training.models.noise.drawer import export_product
from capstan.training.models.noise.objectives import drop_encoders, drop_rows, sample_mse, weighted_mse
from capstan.training.models.noise.process import process_of
from capstan.training.models.noise.schedulers import STEPS, check_all_steps
from capstan.training.models.precision import needs_upcast, outside_autocast
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.precomputed.latents import check_latents, measure
from capstan.training.precomputed.text_embeddings import states_of
from capstan.training.product import find_product, quieten, read_facts, write_facts

_TOKENIZER = "tokenizer"
_KEPT_WHOLE = 100_000  # elements of a weight that the engine's ZeRO 3 does not shard
_STYLE_SAMPLES = 512  # captions that the style is measured on


class DiffusionFamily(Family):
    """The family that trains a backbone (and text encoders unless frozen ones are given) on latents."""

    name: ClassVar[str] = "diffusion"
    settings: ClassVar[type[Section]] = DiffusionSettings
    buckets: ClassVar[bool] = DiffusionSettings.buckets
    draws: ClassVar[Kind | None] = "image"

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the tokenizer (learnt from the captions, or that of `train.init`), image size and caption style."""
        settings: DiffusionSettings = train.settings
        if settings.text.pretrained is None and train.init is not None:
            _copy_tokenizer(settings, find_product(train.init, "train.init"), folder / _TOKENIZER)
        elif settings.text.pretrained is None:
            Tokenizer.train(samples.captions(), settings.text.vocab_size).save(folder / _TOKENIZER)
        size, identity = measure(train, cls.encoder(train), samples)
        check_latents(train, identity)
        write_facts(folder, size=size, style=_style(samples).facts())

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: DiffusionSettings = train.settings
        self.backbone = backbone_of(self.train)
        self.vae = _load_vae(self.train, shifts=self.backbone.shifts)
        self.assets = assets
        self.size = int(read_facts(assets)["size"])
        self.side = self.size // factor_of(self.vae.config)
        encoders = self.text_encoder(train)
        self.text = encoders or new_encoders(self.backbone.slots, self.train.text, assets / _TOKENIZER)
        if self.text.own and train.engine.strategy == "deepspeed" and train.engine.zero == 3:
            _check_positions(self.text)
        sizes = sizes_of(train.data.buckets) if train.data.buckets is not None else []
        longest = max((max(size) // factor_of(self.vae.config) for size in sizes), default=self.side)
        net = self.backbone.build(
            LatentSpec.of(int(self.vae.config.latent_channels), self.side, self.text.encoders, longest)
        )
        self.model = Denoiser(self.backbone, net, self.text)
        self.frozen = [self.vae]
        if encoders is not None and train.data.text_states is None:
            self.frozen += encoders.modules
        elif encoders is not None:  # precomputed: the encoders, which can be larger than the network, stay off the GPU
            encoders.to(torch.device("cpu"))
        self.process = process_of(self.train, self.size, exact=self.backbone.exact_times)
        check_all_steps(train, self.process.scheduler())

    @classmethod
    def encoder(cls, train: TrainConfig) -> KlEncoder:
        return KlEncoder(train.settings.autoencoder, "train.diffusion.autoencoder")

    @classmethod
    def multiples(cls, train: TrainConfig) -> tuple[int, int]:
        backbone = backbone_of(train.settings)
        return backbone.patch, backbone.divisor

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoders | None:
        """Return the frozen encoders, whose states can be precomputed; None if they are trained."""
        settings: DiffusionSettings = train.settings
        if settings.text.pretrained is None:
            return None
        return open_encoders(backbone_of(settings).slots, settings.text)

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module | None:
        """Return a new network with its text encoders, for latents of 4 channels; None if the encoders are frozen."""
        text = train.settings.text
        if text.pretrained is not None:
            return None
        backbone = backbone_of(train.settings)
        encoders = unread_encoders(backbone.slots, text)
        net = backbone.build(LatentSpec.of(4, 128, encoders))
        return torch.nn.ModuleList([net, *(encoder.encoder for encoder in encoders)])

    def start_from(self, product: Path) -> None:
        model = self.model
        mine = {slot.name: getattr(model, slot.name) for slot in model.text_slots} | {self.backbone.part: model.net}
        load_parts({name: module for name, module in mine.items() if module is not None}, product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch: Batch = {**self.text.ids([sample.text for sample in samples]), **states_of(samples)}
        if self.backbone.conditioned:
            batch["conditions"] = conditions_of(samples, self.size, crop=self.train.crop)
        latents = [sample.latent for sample in samples if sample.latent is not None]
        if latents:
            batch["latents"] = torch.from_numpy(np.stack(latents))
        else:
            batch["pictures"] = batch_of(samples, self.size, crop=self.train.crop)
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        latents = self._latents(batch, draw)
        task = self.process.draw(latents, draw)
        count = len(task.noisy)
        dropped = drop_rows(count, self.train.drop_text, draw)
        text, metrics = self.text.given(batch, dropped), {"text_dropped": dropped.float().mean()}
        kept = None
        if self.train.drop_each is not None:
            kept = ~drop_encoders(count, len(self.text.encoders), self.train.drop_each, draw)
            metrics["encoders_dropped"] = 1 - kept.float().mean()
        prediction = model(task.noisy.to(dtype), task.timesteps, text, batch.get("conditions"), kept)
        source = "the stored latents" if "latents" in batch else "the autoencoder (train.diffusion.autoencoder)"
        self.finite = {source: finite([latents])}
        if not self.text.own:
            self.finite |= {f"the text encoder ({name})": finite([value]) for name, value in text.items()}
        self.finite[f"the network ({self.backbone.part})"] = finite([prediction.detach()])
        metrics["loss_by_time"] = PerSampleLoss(sample_mse(prediction.detach(), task.target), task.timesteps / STEPS)
        return weighted_mse(prediction, task.target, task.weight), metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a diffusers pipeline with the EMA's weights."""
        parts = {"vae": self.vae.to("cpu"), "scheduler": self.process.scheduler(), self.backbone.part: model.net}
        for encoder in self.text.encoders:
            trained = getattr(model, encoder.slot.name)
            parts[encoder.slot.name] = encoder.encoder.to("cpu") if trained is None else trained
            parts[encoder.slot.tokenizer] = encoder.tokenizer
        self.backbone.pipeline(parts).save_pretrained(folder, safe_serialization=True)
        style = read_facts(self.assets).get("style")  # missing in runs started before it was measured
        facts = {"size": self.size, "sampling": self.train.sampling.model_dump(exclude={"sampler"})}
        if (chunks := self.train.text.chunks or 1) > 1:
            facts["text_chunks"] = chunks
        write_facts(folder, family=self.name, **facts, **({"style": style} if style else {}))

    @classmethod
    def open(cls, product: Path, device: torch.device) -> LatentDrawer:
        return LatentDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the pipeline. Raises RecipeError if it would read prompts otherwise than the model was trained."""
        if (chunks := read_facts(product).get("text_chunks", 1)) > 1:
            problem = f"{product} reads prompts in {chunks} chunks, and a diffusers pipeline reads one"
            raise RecipeError("RUN", problem, "use capstan sample, or train with train.diffusion.text.chunks: 1")
        return export_product(product, folder, precision, sampler)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the longest text encoder reads."""
        longest = max(self.text.encoders, key=lambda encoder: encoder.longest)
        if self.text.own and longest.slot.length is None:
            hint = "raise train.diffusion.text.length in a new run, or write shorter captions"
        else:
            hint = "use a T5 (preset dit-* or mmdit-*), a CLIP with a longer context, or shorter captions"
            if all(slot.kind == "clip" for slot in self.backbone.slots):
                hint = f"set train.diffusion.text.chunks: {(self.train.text.chunks or 1) + 1} in a new run, {hint}"
        lengths = [longest.tokens(text) for _, text in some_captions(samples)]
        warn_of_cut(self.name, lengths, longest.longest, hint)

    def describe(self) -> dict[str, Any]:
        facts = super().describe() | {"size": self.size, "latents": [self.vae.config.latent_channels, *[self.side] * 2]}
        facts[self.backbone.part] = sum(p.numel() for p in self.model.net.parameters())
        vocabularies = {f"vocabulary{encoder.slot.suffix}": len(encoder.tokenizer) for encoder in self.text.encoders}
        return facts | vocabularies | {"objective": self.train.objective}

    def _latents(self, batch: Batch, draw: torch.Generator) -> torch.Tensor:
        """Return the network's latents [B, C, h, w]: sampled from the posterior, shifted, scaled; float32."""
        if "latents" in batch:  # stored: mean, then standard deviation, along the channels
            mean, std = batch["latents"].float().chunk(2, dim=1)
        else:
            images = to_signed(batch["pictures"]).to(self.vae.dtype)
            exact = outside_autocast(images.device) if needs_upcast(self.vae) else contextlib.nullcontext()
            with torch.no_grad(), exact:
                posterior = self.vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
        noise = normal(mean.shape, draw)
        return (mean + std * noise - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor


def _load_vae(settings: DiffusionSettings, *, shifts: bool) -> Any:
    """Load the autoencoder. Raises RecipeError if it normalises latents in a way that the pipeline does not undo."""
    vae = load_autoencoder(settings.autoencoder, "train.diffusion.autoencoder")
    unknown = [name for name in ("shift_factor", "latents_mean", "latents_std") if vae.config.get(name)]
    if unknown and not (shifts and unknown == ["shift_factor"]):
        problem = f"has a {unknown[0]}, which the diffusers pipeline of this network does not apply"
        raise RecipeError("train.diffusion.autoencoder", problem, "use an autoencoder without it")
    return vae


def _check_positions(text: TextEncoders) -> None:
    """Raise RecipeError if ZeRO 3 would shard a CLIP's table of positions, whose shape transformers reads."""
    for encoder in text.encoders:
        shape = encoder.encoder.config
        if shape.max_position_embeddings * shape.hidden_size > _KEPT_WHOLE:
            problem = f"would shard the {shape.max_position_embeddings} positions of a text encoder this wide"
            raise RecipeError("train.engine.zero", problem, "use zero: 2, or a smaller train.diffusion.text.width")


def _copy_tokenizer(settings: DiffusionSettings, product: Path, folder: Path) -> None:
    """Copy the tokenizer of a product whose text encoders are trained further. Raises RecipeError."""
    name = next(slot.tokenizer for slot in backbone_of(settings).slots if slot.required)
    config = product / name / "tokenizer_config.json"
    if not config.is_file() or "CLIPTokenizer" not in config.read_text(encoding="utf-8"):
        problem = f"{product} has no CLIP tokenizer in {name}"
        raise RecipeError("train.init", problem, "use a run of the same network that trained its own text encoders")
    shutil.copytree(product / name, folder)


def _style(samples: Samples) -> Style:
    """Measure the style of the captions of the most frequent slot."""
    texts: dict[str, list[str]] = {}
    for index in range(0, len(samples), max(1, len(samples) // _STYLE_SAMPLES)):
        sample = samples.sample(index)
        texts.setdefault(sample.slot, []).append(sample.text)
    slot = max(texts, key=lambda name: len(texts[name]), default="")
    return Style.of(texts.get(slot, []))
