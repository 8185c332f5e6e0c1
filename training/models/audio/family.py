"""The family `audio`: captions → sounds (Evans et al. 2024, Stable Audio)

sound ─frozen autoencoder─▶ latents ─noise─▶ noisy latents, noise level ─┐
caption ─T5─▶ states ─┐                                                     ├▶ transformer ─▶ v; loss = squared error
start, length in s ────┴▶ projection ─(some emptied)──────────────────────┘
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.sounds import Form, batch_of, form_of, pieces_of, to_wave
from capstan.training.drawing.drawer import Kind, refuse_options
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.audio.config import AudioSettings
from capstan.training.models.audio.drawer import SoundDrawer
from capstan.training.models.audio.model import (
    Denoiser,
    build_projection,
    build_transformer,
    noised,
    scheduler_of,
)
from capstan.training.models.audio.text import ids_of, open_text, save_tokenizer
from capstan.training.models.noise.drawer import export_product, open_pipeline
from capstan.training.models.noise.objectives import drop_rows, sample_mse
from capstan.training.models.oobleck.encoder import LEAST, SoundEncoder, split_latents
from capstan.training.models.oobleck.family import load_oobleck
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.precomputed.latents import check_latents, measure
from capstan.training.product import find_product, quieten, read_facts, write_facts

_TOKENIZER: Final = "tokenizer"
_FIELD: Final = "train.audio.autoencoder"


class _Wanted:
    """The form that an autoencoder fixes, for `form_of`."""

    def __init__(self, vae: Any, seconds: float | None) -> None:
        self.rate, self.channels = int(vae.config.sampling_rate), int(vae.config.audio_channels)
        self.seconds = seconds


def _form(settings: AudioSettings, vae: Any, samples: Samples | None) -> Form:
    """Return the form of the sounds; `samples` may be None if the settings state its seconds."""
    return form_of(samples, _Wanted(vae, settings.seconds), vae.hop_length, "train.audio")


class AudioFamily(Family):
    """The family that trains a StableAudioDiTModel, and a T5 unless a frozen one is given, on latents of sounds."""

    name: ClassVar[str] = "audio"
    settings: ClassVar[type[Section]] = AudioSettings
    draws: ClassVar[Kind | None] = "sound"
    reads: ClassVar[tuple[str, ...]] = AudioSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the tokenizer (learnt from the captions, or that of `train.init`), and the sounds' form."""
        settings: AudioSettings = train.settings
        if train.data.latents is not None:
            encoder = cls.encoder(train)
            check_latents(train, measure(train, encoder, samples)[1])
            form = encoder.form
        else:
            form = _form(settings, load_oobleck(settings.autoencoder, _FIELD), samples)
        if form.seconds > settings.longest:
            problem = f"the sounds have {form.seconds:g} s, and timing states up to {settings.longest}"
            raise RecipeError("train.audio.longest", problem, "raise it, or set train.audio.seconds")
        if settings.text.pretrained is None and train.init is not None:
            shutil.copytree(find_product(train.init, "train.init") / _TOKENIZER, folder / _TOKENIZER)
        elif settings.text.pretrained is None:
            save_tokenizer(samples.captions(), settings.text, folder / _TOKENIZER)
        write_facts(folder, rate=form.rate, channels=form.channels, values=form.values)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: AudioSettings = train.settings
        facts = read_facts(assets)
        self.form = Form(facts["rate"], facts["channels"], facts["values"])
        self.vae = load_oobleck(self.train.autoencoder, _FIELD)
        text = self.train.text
        self.t5, self.tokenizer = open_text(text, assets / _TOKENIZER, "train.audio.text.pretrained")
        own = text.pretrained is None
        channels = int(self.vae.config.decoder_input_channels)
        self.length = self.form.values // int(self.vae.hop_length)
        self.model = Denoiser(
            build_transformer(self.train.transformer, channels=channels, length=self.length),
            build_projection(self.t5.config.d_model, self.train.transformer, self.train.longest),
            self.t5 if own else None,
        )
        self.frozen = [self.vae] if own else [self.vae, self.t5]

    @classmethod
    def encoder(cls, train: TrainConfig) -> SoundEncoder:
        settings: AudioSettings = train.settings
        settings.check_ahead()
        vae = load_oobleck(settings.autoencoder, _FIELD)
        form = _form(settings, vae, None)
        if form.values < LEAST * vae.hop_length:
            problem = f"{settings.seconds} s are less than {LEAST} latents of {vae.hop_length} values"
            raise RecipeError("train.audio.seconds", problem, f"set {LEAST * vae.hop_length / form.rate:g} or more")
        return SoundEncoder(vae, form, _FIELD)

    def start_from(self, product: Path) -> None:
        pipeline = open_pipeline(product, torch.device("cpu"))
        try:
            for name in ("transformer", "projection_model", "text_encoder"):
                if (part := getattr(self.model, name)) is not None:
                    part.load_state_dict(getattr(pipeline, name).state_dict())
        except (AttributeError, RuntimeError) as error:
            problem = f"{product} has a different shape ({error})"
            raise RecipeError("train.init", problem, "use the settings of that run") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch = ids_of(self.tokenizer, [sample.text for sample in samples])
        if stored := [sample.latent for sample in samples if sample.latent is not None]:
            latents, seconds = split_latents(stored)
            return {"latents": latents, "seconds": seconds, **batch}
        pieces = pieces_of(samples, self.form, self.train.part)
        seconds = torch.tensor([[piece.start_s, piece.total_s] for piece in pieces], dtype=torch.float32)
        return {"sounds": batch_of(pieces), "seconds": seconds, **batch}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        text = {"ids": batch["ids"], "mask": batch["mask"]}
        with torch.no_grad():
            latents = self._latents(batch)
            if self.train.text.pretrained is not None:
                text["states"] = self.t5(text["ids"], attention_mask=text["mask"])[0]
        task = noised(latents, self.train.sampling, draw)
        dropped = drop_rows(len(latents), self.train.drop_text, draw)
        made = model(task.noisy.to(dtype), task.levels, text, batch["seconds"], dropped)
        source = "the stored latents" if "latents" in batch else f"the autoencoder ({_FIELD})"
        self.finite = {
            source: finite([latents]),
            "the network (transformer)": finite([made.detach()]),
        }
        errors = sample_mse(made, task.target)
        metrics: dict[str, Any] = {"text_dropped": dropped.float().mean(), "latent_rms": latents.square().mean().sqrt()}
        metrics["loss_by_time"] = PerSampleLoss(errors.detach(), task.places)
        return errors.mean(), metrics

    def _latents(self, batch: Batch) -> torch.Tensor:
        """Return the sounds' latents [B, C, L], float32: the posteriors' means."""
        if "latents" in batch:
            return batch["latents"]
        means: torch.Tensor = self.vae.encode(to_wave(batch["sounds"]).to(self.vae.dtype)).latent_dist.mean.float()
        return means

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a StableAudioPipeline with the EMA's weights."""
        from diffusers import StableAudioPipeline

        encoder = model.text_encoder if model.text_encoder is not None else self.t5.to("cpu")
        pipeline = StableAudioPipeline(
            vae=self.vae.to("cpu"),
            text_encoder=encoder,
            projection_model=model.projection_model,
            tokenizer=self.tokenizer,
            transformer=model.transformer,
            scheduler=scheduler_of(self.train.sampling),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        sampling = self.train.sampling.model_dump(include={"steps", "guidance"})
        write_facts(folder, family=self.name, seconds=self.form.seconds, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> SoundDrawer:
        return SoundDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        refuse_options({"sampler": sampler})
        return export_product(product, folder, precision)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        lengths = [len(self.tokenizer(text, truncation=False).input_ids) for _, text in some_captions(samples)]
        warn_of_cut(self.name, lengths, self.train.text.length, "raise train.audio.text.length in a new run")

    def describe(self) -> dict[str, Any]:
        transformer = sum(p.numel() for p in self.model.transformer.parameters())
        latents = [int(self.vae.config.decoder_input_channels), self.length]
        shape = {"rate": self.form.rate, "seconds": self.form.seconds, "latents": latents}
        return {**super().describe(), **shape, "transformer": transformer, "vocabulary": len(self.tokenizer)}
