"""The family `video_autoencoder`: clips and images → a trained AutoencoderKLCogVideoX of diffusers

Loss = reconstruction + kl · KL per pixel value (Rombach et al. 2022, latent diffusion, app. G), over the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.clips import clips_of_lengths, first_rate
from capstan.training.data.transforms import image_size, to_signed
from capstan.training.drawing.drawer import ClipCodec
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.autoencoder.first_stage import factor_of, load_weights
from capstan.training.models.video_autoencoder.config import VideoAutoencoderSettings
from capstan.training.models.video_autoencoder.encoder import load_video_autoencoder
from capstan.training.models.video_autoencoder.model import (
    VideoAutoencoder,
    build,
    latent_frames,
    reconstruct,
    standardise,
)
from capstan.training.product import read_facts, write_facts

_CLIPS: Final = "clips.npy"  # uint8 [N, frames, 3, size, size]: the clips that latents are measured on
_FPS: Final = 8.0  # written down for a run without any clip


class VideoAutoencoderFamily(Family):
    """The family that trains an AutoencoderKLCogVideoX on the dataset's clips and images."""

    name: ClassVar[str] = "video_autoencoder"
    settings: ClassVar[type[Section]] = VideoAutoencoderSettings
    captions: ClassVar[bool] = VideoAutoencoderSettings.captions
    reads: ClassVar[tuple[str, ...]] = VideoAutoencoderSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Save the clips that latents are measured on; this fixes the size of the frames and their rate."""
        settings: VideoAutoencoderSettings = train.settings
        size = image_size(samples, settings.size, factor_of(settings), f"train.{cls.name}.size")
        count = min(settings.statistics, len(samples))
        some = [samples.sample(number * len(samples) // count) for number in range(count)]
        clips, frames = clips_of_lengths(some, [settings.frames], settings.fps, (size, size))
        whole = frames == settings.frames
        np.save(folder / _CLIPS, clips[whole] if whole.any() else clips[:, :1])
        write_facts(folder, size=size, fps=settings.fps or first_rate(samples) or _FPS)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train: VideoAutoencoderSettings = train.settings
        facts = read_facts(assets)
        self.size, self.fps = int(facts["size"]), float(facts["fps"])
        self.clips = np.load(assets / _CLIPS, mmap_mode="r")
        self.model = VideoAutoencoder(build(self.train.shape(), self.size, self.train.log_variance))
        side = self.size // factor_of(self.train)
        self.latents = (self.train.latent_channels, latent_frames(self.train.frames, self.train.time_ratio), side, side)

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module:
        settings: VideoAutoencoderSettings = train.settings
        model: torch.nn.Module = build(settings.shape(), settings.size or 256, settings.log_variance)
        return model

    def start_from(self, product: Path) -> None:
        load_weights(self.model.vae, load_video_autoencoder(str(product), "train.init").state_dict(), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        size = (self.size, self.size)
        clips, counts = clips_of_lengths(samples, [self.train.frames], self.train.fps, size, self.train.part)
        return {"clips": torch.from_numpy(clips), "frames": torch.from_numpy(counts)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        counts = batch["frames"]
        there = torch.arange(self.train.frames, device=counts.device) < counts[:, None]  # [B, frames]
        clips = to_signed(batch["clips"]).transpose(1, 2) * there[:, None, :, None, None]
        noise = normal((len(clips), *self.latents), draw)
        made, mean, log_variance = model(clips.to(next(model.parameters()).dtype), counts, noise)
        self.finite = {"the encoder": finite([mean, log_variance]), "the decoder": finite([made])}
        difference = made.float() - clips
        squares = _mean_over(difference.square(), counts)
        errors = squares if self.train.reconstruction == "l2" else _mean_over(difference.abs(), counts)
        mean, log_variance = mean.float(), log_variance.float()
        length = torch.arange(self.latents[1], device=counts.device)
        seen = length < ((counts - 1) // self.train.time_ratio + 1)[:, None]
        each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance) * seen[:, None, :, None, None]
        kl = each.flatten(1).sum(1) / (counts * 3 * self.size**2)
        loss = errors.mean() + self.train.kl * kl.mean()
        decibels = 10 * torch.log10(4 / squares.detach().clamp(min=1e-10))
        return loss, {"reconstruction": errors.detach().mean(), "psnr": decibels.mean(), "kl": kl.detach().mean()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write an AutoencoderKLCogVideoX folder whose latents have a mean square of 1 on the dataset's clips."""
        clips = to_signed(torch.from_numpy(np.array(self.clips)).transpose(1, 2))
        scale = standardise(model.vae, clips)
        model.vae.save_pretrained(folder, safe_serialization=True)
        facts = {"size": self.size, "frames": self.train.frames, "fps": self.fps}
        write_facts(folder, family=self.name, **facts, latents_before=scale.tolist())

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> CausalCodec:
        return CausalCodec(load_video_autoencoder(str(product), "RUN").to(device), product)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "size": self.size, "frames": self.train.frames, "latents": list(self.latents)}


class CausalCodec(ClipCodec):
    """An opened AutoencoderKLCogVideoX."""

    def __init__(self, vae: Any, product: Path) -> None:
        facts, ratio = read_facts(product), int(vae.config.temporal_compression_ratio)
        self.vae, self.fps = vae, float(facts.get("fps", _FPS))
        self.frames, self.size = int(facts.get("frames", 2 * ratio + 1)), int(facts.get("size", 256))

    def reconstruct(self, clips: np.ndarray, batch: int) -> np.ndarray:
        return reconstruct(self.vae, clips, batch)


def _mean_over(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return each sample's mean [B] of values [B, 3, F, H, W] over its first `counts` frames; the others are zero."""
    return values.sum((1, 2, 3, 4)) / (counts * values[0, :, 0].numel())
