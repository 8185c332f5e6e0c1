"""The family `svd`: clips → a StableVideoDiffusionPipeline of diffusers, from an image run

frames ─the image run's autoencoder─▶ latents ─noise─▶ noisy latents, c_noise ─────────┐
first frame ─noise─▶ autoencoder ─▶ latents, repeated over the frames ─(some dropped)─┤
first frame ─CLIP─▶ embedding ─(some dropped)─────────────────────────────────────────┼▶ UNetSpatioTemporal ─▶ F
frames per second, motion bucket, noise level ────────────────────────────────────────┘
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.clips import clips_of
from capstan.training.data.transforms import image_size, to_signed
from capstan.training.drawing.drawer import Kind, refuse_options
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.autoencoder.family import factor_of, load_autoencoder
from capstan.training.models.load_parts import load_parts
from capstan.training.models.noise.drawer import export_product
from capstan.training.models.noise.objectives import drop_rows, sample_mse
from capstan.training.models.precision import needs_upcast, outside_autocast
from capstan.training.models.svd.conditions import buckets_of, for_clip, image_encoder, motion_of
from capstan.training.models.svd.config import SvdSettings
from capstan.training.models.svd.drawer import ImageToClip
from capstan.training.models.svd.network import FIELD, Continuer, image_product, video_unet
from capstan.training.models.svd.noise import log_normal, noised, scheduler_of
from capstan.training.product import quieten, read_facts, write_facts

_MEASURED: Final = 128  # clips on which the motion of bucket 255 is found
_FASTEST: Final = 95  # per cent of clips with less motion than that
_STILL: Final = 1.0  # least motion of bucket 255, for a dataset in which nothing moves
_MULTIPLE: Final = 8  # of the pipeline's sizes


class SvdFamily(Family):
    """The family that trains a UNetSpatioTemporalConditionModel, and a CLIP unless a frozen one is given."""

    name: ClassVar[str] = "svd"
    settings: ClassVar[type[Section]] = SvdSettings
    captions: ClassVar[bool] = SvdSettings.captions
    draws: ClassVar[Kind | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = SvdSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the size of the frames, their rate, and the motion of bucket 255."""
        settings: SvdSettings = train.settings
        factor = factor_of(load_autoencoder(str(image_product(settings)), FIELD).config)
        size = image_size(samples, settings.size, int(np.lcm(_MULTIPLE, factor)), f"train.{cls.name}.size")
        count = min(_MEASURED, len(samples))
        some = [samples.sample(number * len(samples) // count) for number in range(count)]
        rates = _rates(some, settings.fps)
        fastest = settings.fastest
        if fastest is None:
            clips = _clips(some, settings, size)
            moved = [motion_of(clip.transpose(0, 2, 3, 1), fps) for clip, fps in zip(clips, rates, strict=True)]
            fastest = max(_STILL, float(np.percentile(moved, _FASTEST)))
        write_facts(folder, size=size, fps=rates[0], fastest=fastest)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: SvdSettings = train.settings
        facts = read_facts(assets)
        self.size, self.fps, self.fastest = int(facts["size"]), float(facts["fps"]), float(facts["fastest"])
        self.vae = load_autoencoder(str(image_product(self.train)), FIELD)
        unet, self.taken = video_unet(self.train, self.size // factor_of(self.vae.config))
        settings, field = self.train.image_encoder, f"train.{self.name}.image_encoder.pretrained"
        self.clip, self.processor = image_encoder(settings, int(unet.config.cross_attention_dim), field)
        own = settings.pretrained is None
        self.model = Continuer(unet, self.clip if own else None)
        self.frozen = [self.vae] if own else [self.vae, self.clip]

    def start_from(self, product: Path) -> None:
        load_parts(dict(self.model.named_children()), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        clips, rates = _clips(samples, self.train, self.size), _rates(samples, self.train.fps)
        moved = [motion_of(clip.transpose(0, 2, 3, 1), fps) for clip, fps in zip(clips, rates, strict=True)]
        numbers = np.array([*zip(rates, buckets_of(moved, self.fastest), strict=True)], np.float32)
        return {"clips": torch.from_numpy(clips), "numbers": torch.from_numpy(numbers)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype, clips = next(model.parameters()).dtype, batch["clips"]
        first = to_signed(clips[:, 0])
        level = log_normal(len(clips), self.train.augment, draw)
        noisy_first = first + level[:, None, None, None] * normal(first.shape, draw)
        with torch.no_grad(), self._exact(clips.device):
            image = self.vae.encode(noisy_first.to(self.vae.dtype)).latent_dist.mode().float()
            posterior = self.vae.encode(to_signed(clips.flatten(0, 1)).to(self.vae.dtype)).latent_dist
            given = for_clip(first, self.processor)
            if self.train.image_encoder.pretrained is not None:
                given = self.clip(given.to(self.clip.dtype)).image_embeds.float()
        latents = self._sampled(posterior, clips.shape[:2], draw)
        task = noised(latents, self.train.noise, draw)
        dropped = drop_rows(len(clips), self.train.drop_image, draw)
        fps, bucket = batch["numbers"].unbind(1)
        numbers = torch.stack([fps - 1, bucket, level], dim=1)  # one less, as in the pipeline
        made = model(task.noisy.to(dtype), task.levels, image, given, numbers, dropped)
        source = f"the image run's autoencoder ({FIELD})"
        self.finite = {source: finite([latents, image]), "the network (unet)": finite([made.detach()])}
        errors = sample_mse(made, task.target)
        metrics: dict[str, Any] = {
            "image_dropped": dropped.float().mean(),
            "latent_rms": latents.square().mean().sqrt(),
        }
        metrics |= {"motion": bucket.mean(), "loss_by_time": PerSampleLoss(errors.detach(), task.places)}
        return errors.mean(), metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a StableVideoDiffusionPipeline with the EMA's weights."""
        from diffusers import StableVideoDiffusionPipeline

        pipeline = StableVideoDiffusionPipeline(
            vae=self.vae.to("cpu"),
            image_encoder=model.image_encoder if model.image_encoder is not None else self.clip.to("cpu"),
            unet=model.unet,
            scheduler=scheduler_of(self.train.sampling),
            feature_extractor=self.processor,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        facts = {"size": self.size, "frames": self.train.frames, "fps": self.fps, "fastest": self.fastest}
        write_facts(folder, family=self.name, **facts, sampling=self.train.sampling.model_dump())

    @classmethod
    def open(cls, product: Path, device: torch.device) -> ImageToClip:
        return ImageToClip(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        refuse_options({"sampler": sampler})
        return export_product(product, folder, precision)

    def describe(self) -> dict[str, Any]:
        side = self.size // factor_of(self.vae.config)
        latents = [self.train.frames, self.vae.config.latent_channels, side, side]
        shape = {"size": self.size, "latents": latents, "fps": self.fps, "fastest": round(self.fastest, 2)}
        return super().describe() | {"from_the_image_run": self.taken} | shape

    def _exact(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return outside_autocast(device) if needs_upcast(self.vae) else contextlib.nullcontext()

    def _sampled(self, posterior: Any, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
        """Return latents [B, frames, C, h, w] of deviation 1, drawn from the posteriors of all frames; float32."""
        mean, std = (part.float().unflatten(0, shape) for part in (posterior.mean, posterior.std))
        drawn: torch.Tensor = (mean + std * normal(mean.shape, draw)) * self.vae.config.scaling_factor
        return drawn


def _clips(samples: Sequence[Sample], settings: SvdSettings, size: int) -> np.ndarray:
    """Return uint8 [B, frames, 3, size, size]. Raises ValueError for a sample without a clip."""
    if missing := [sample.key for sample in samples if "mp4" not in sample.parts]:
        raise ValueError(f"sample {missing[0]} has no clip (mp4)")
    return clips_of(samples, settings.frames, settings.fps, (size, size), settings.part)[0]


def _rates(samples: Sequence[Sample], fps: float | None) -> list[float]:
    """Return the frames per second at which each clip is seen."""
    from capstan.pipeline.media.codec import frame_rate

    return [fps or frame_rate(sample.parts["mp4"]) for sample in samples]
