"""The family `cogvideox`: captioned clips and images → a CogVideoXPipeline of diffusers

clip ─frozen video autoencoder─▶ latents ─process─▶ noisy latents, one time for all frames ─┐
caption ─T5─▶ states of all tokens ─(of some: those of the empty caption)───────────────────┴▶ transformer
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.clips import clips_of_lengths, first_rate
from capstan.training.data.transforms import to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.audio.text import ids_of, open_text, save_tokenizer
from capstan.training.models.autoencoder.family import factor_of
from capstan.training.models.cogvideox.config import CogvideoxSettings
from capstan.training.models.cogvideox.drawer import TextToClip
from capstan.training.models.cogvideox.model import Denoiser, build_transformer
from capstan.training.models.load_parts import load_parts
from capstan.training.models.noise.drawer import export_product
from capstan.training.models.noise.objectives import drop_rows
from capstan.training.models.noise.process import process_of
from capstan.training.models.noise.schedulers import STEPS, check_all_steps
from capstan.training.models.precision import needs_upcast, outside_autocast
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.models.video_autoencoder.config import fits
from capstan.training.models.video_autoencoder.encoder import CausalEncoder, counted, load_video_autoencoder
from capstan.training.models.video_autoencoder.model import by_length, latent_frames
from capstan.training.precomputed.latents import check_latents, measure
from capstan.training.product import find_product, quieten, read_facts, write_facts

_FIELD: Final = "train.cogvideox.autoencoder"
_TOKENIZER: Final = "tokenizer"
_FPS: Final = 8.0  # written down for a run without any clip


class CogvideoxFamily(Family):
    """The family that trains a CogVideoXTransformer3DModel, and a T5 unless a frozen one is given."""

    name: ClassVar[str] = "cogvideox"
    settings: ClassVar[type[Section]] = CogvideoxSettings
    buckets: ClassVar[bool] = CogvideoxSettings.buckets
    draws: ClassVar[Kind | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = CogvideoxSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the tokenizer (learnt from the captions, or that of `train.init`), the frames' size and rate."""
        settings: CogvideoxSettings = train.settings
        encoder = cls.encoder(train)
        size, identity = measure(train, encoder, samples)
        check_latents(train, identity)
        if settings.text.pretrained is None and train.init is not None:
            shutil.copytree(find_product(train.init, "train.init") / _TOKENIZER, folder / _TOKENIZER)
        elif settings.text.pretrained is None:
            save_tokenizer(samples.captions(), settings.text, folder / _TOKENIZER)
        fps = settings.fps or (None if train.data.latents is not None else first_rate(samples))
        write_facts(folder, size=size, fps=fps or _FPS)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: CogvideoxSettings = train.settings
        facts = read_facts(assets)
        self.size, self.fps = int(facts["size"]), float(facts["fps"])
        self.vae = _first_stage(self.train)
        text = self.train.text
        self.t5, self.tokenizer = open_text(text, assets / _TOKENIZER, "train.cogvideox.text.pretrained")
        self.empty = ids_of(self.tokenizer, [""])["ids"]
        self.ratio, own = int(self.vae.config.temporal_compression_ratio), text.pretrained is None
        transformer = build_transformer(
            self.train.transformer,
            channels=self.vae.config.latent_channels,
            side=self.size // factor_of(self.vae.config),
            frames=self.train.lengths[-1],
            ratio=self.ratio,
            text=(self.t5.config.d_model, text.length),
        )
        self.model = Denoiser(transformer, self.t5 if own else None)
        self.frozen = [self.vae] if own else [self.vae, self.t5]
        self.process = process_of(self.train, self.size, exact=False)
        check_all_steps(train, self.process.scheduler())

    @classmethod
    def encoder(cls, train: TrainConfig) -> CausalEncoder:
        settings: CogvideoxSettings = train.settings
        _first_stage(settings)
        return CausalEncoder(settings.autoencoder, _FIELD, settings.lengths, settings.fps)

    @classmethod
    def multiples(cls, train: TrainConfig) -> tuple[int, int]:
        settings: CogvideoxSettings = train.settings
        return settings.transformer.patch, settings.transformer.patch

    def start_from(self, product: Path) -> None:
        load_parts(dict(self.model.named_children()), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch: Batch = {"ids": ids_of(self.tokenizer, [sample.text for sample in samples])["ids"]}
        latents = [sample.latent for sample in samples if sample.latent is not None]
        if latents:
            batch["latents"] = torch.from_numpy(np.stack(latents))
            return batch | {"frames": torch.from_numpy(counted(latents))}
        size = samples[0].bucket or (self.size, self.size)
        clips, counts = clips_of_lengths(samples, self.train.lengths, self.train.fps, size, self.train.part)
        counts = np.array([latent_frames(int(count), self.ratio) for count in counts], np.int64)
        return batch | {"clips": torch.from_numpy(clips), "frames": torch.from_numpy(counts)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype, counts = next(model.parameters()).dtype, batch["frames"]
        latents = self._latents(batch, draw)
        task = self.process.draw(latents, draw)
        dropped = drop_rows(len(latents), self.train.drop_text, draw)
        text = {"ids": torch.where(dropped[:, None], self.empty.to(dropped.device), batch["ids"])}
        if self.train.text.pretrained is not None:
            with torch.no_grad():
                text["states"] = self.t5(text["ids"])[0]
        made = model(task.noisy.to(dtype), task.timesteps, text, counts)
        source = "the stored latents" if "latents" in batch else f"the video autoencoder ({_FIELD})"
        self.finite = {source: finite([latents]), "the network (transformer)": finite([made.detach()])}
        there = torch.arange(latents.shape[1], device=counts.device) < counts[:, None]
        squares = (made.float() - task.target.float()).square() * there[:, :, None, None, None]
        errors = squares.flatten(1).sum(1) / (counts * squares[0, 0].numel())
        metrics: dict[str, Any] = {"text_dropped": dropped.float().mean(), "images": (counts == 1).float().mean()}
        metrics["loss_by_time"] = PerSampleLoss(errors.detach(), task.timesteps / STEPS)
        return (errors if task.weight is None else errors * task.weight).mean(), metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a CogVideoXPipeline with the EMA's weights."""
        from diffusers import CogVideoXPipeline

        pipeline = CogVideoXPipeline(
            tokenizer=self.tokenizer,
            text_encoder=model.text_encoder if model.text_encoder is not None else self.t5.to("cpu"),
            vae=self.vae.to("cpu"),
            transformer=model.transformer,
            scheduler=self.process.scheduler(),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        sampling = self.train.sampling.model_dump(exclude={"sampler"})
        facts = {"size": self.size, "frames": self.train.lengths[-1], "fps": self.fps}
        write_facts(folder, family=self.name, **facts, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> TextToClip:
        return TextToClip(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        return export_product(product, folder, precision, sampler)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        lengths = [len(self.tokenizer(text, truncation=False).input_ids) for _, text in some_captions(samples)]
        warn_of_cut(self.name, lengths, self.train.text.length, "raise train.cogvideox.text.length in a new run")

    def describe(self) -> dict[str, Any]:
        side = self.size // factor_of(self.vae.config)
        longest = latent_frames(self.train.lengths[-1], self.ratio)
        latents = [longest, self.vae.config.latent_channels, side, side]
        tokens = self.train.text.length + longest * (side // self.train.transformer.patch) ** 2
        return super().describe() | {"size": self.size, "latents": latents, "tokens": tokens, "fps": self.fps}

    def _latents(self, batch: Batch, draw: torch.Generator) -> torch.Tensor:
        """Return the network's latents [B, frames, C, h, w]: sampled from the posteriors, scaled; float32."""
        if "latents" in batch:  # stored: mean, then standard deviation, along the channels
            mean, std = batch["latents"].float().chunk(2, dim=2)
        else:
            mean, std = self._encoded(batch["clips"], batch["frames"])
        drawn: torch.Tensor = (mean + std * normal(mean.shape, draw)) * self.vae.config.scaling_factor
        return drawn

    def _encoded(self, clips: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation for clips [B, frames, 3, H, W], with zeros after the `counts` latents of each."""
        factor, config = factor_of(self.vae.config), self.vae.config
        shape = (len(clips), latent_frames(clips.shape[1], self.ratio), config.latent_channels)
        mean = torch.zeros(*shape, *(side // factor for side in clips.shape[-2:]), device=clips.device)
        std = torch.zeros_like(mean)
        signed = to_signed(clips).transpose(1, 2).to(self.vae.dtype)
        exact = outside_autocast(clips.device) if needs_upcast(self.vae) else contextlib.nullcontext()
        with torch.no_grad(), exact:
            for length, rows in by_length(counts):
                posterior = self.vae.encode(signed[rows, :, : (length - 1) * self.ratio + 1]).latent_dist
                mean[rows, :length] = posterior.mean.float().transpose(1, 2)
                std[rows, :length] = posterior.std.float().transpose(1, 2)
        return mean, std


def _first_stage(settings: CogvideoxSettings) -> Any:
    """Return the video autoencoder. Raises RecipeError if it cannot have clips of these lengths."""
    vae = load_video_autoencoder(settings.autoencoder, _FIELD)
    ratio = int(vae.config.temporal_compression_ratio)
    for frames in settings.lengths:
        if not fits(frames, ratio):
            problem = f"{frames} are not a multiple of {2 * ratio}, and one more, as the autoencoder needs"
            raise RecipeError("train.cogvideox.frames", problem, f"use e.g. {2 * ratio + 1}")
    return vae
