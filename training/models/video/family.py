"""The family `video`: captioned clips → an AnimateDiffPipeline of diffusers, from an image run

frames ─the image run's autoencoder─▶ latents ─process─▶ noisy latents, one time for all frames ─┐
caption ─tokenizer─▶ ids ─(some emptied)─▶ the image run's text encoder ─────────────────────────┴▶ UNetMotionModel
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.clips import clips_of, first_rate
from capstan.training.data.transforms import to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.autoencoder.family import factor_of, load_autoencoder
from capstan.training.models.diffusion.text_encoders import TextEncoders
from capstan.training.models.load_parts import load_parts
from capstan.training.models.noise.drawer import export_product
from capstan.training.models.noise.objectives import drop_rows, sample_mse, weighted_mse
from capstan.training.models.noise.process import process_of
from capstan.training.models.noise.schedulers import STEPS, check_all_steps
from capstan.training.models.precision import needs_upcast, outside_autocast
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.models.video.config import VideoSettings
from capstan.training.models.video.drawer import ClipDrawer
from capstan.training.models.video.encoder import ClipEncoder, is_image
from capstan.training.models.video.motion import FIELD, Animator, image_product, moving_unet, text_encoders
from capstan.training.precomputed.latents import check_latents, measure
from capstan.training.precomputed.text_embeddings import states_of
from capstan.training.product import quieten, read_facts, write_facts

_FPS = 8.0  # written down for a run without any clip


class VideoFamily(Family):
    """The family that trains motion modules, and as the settings say the text encoder and the image model."""

    name: ClassVar[str] = "video"
    settings: ClassVar[type[Section]] = VideoSettings
    draws: ClassVar[Kind | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = VideoSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the size of the frames and their rate."""
        settings: VideoSettings = train.settings
        image_product(settings)
        size, identity = measure(train, cls.encoder(train), samples)
        check_latents(train, identity)
        fps = settings.fps or (None if train.data.latents is not None else first_rate(samples))
        write_facts(folder, size=size, fps=fps or _FPS)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: VideoSettings = train.settings
        facts = read_facts(assets)
        self.size, self.fps = int(facts["size"]), float(facts["fps"])
        self.vae = load_autoencoder(str(image_product(self.train)), FIELD)
        self.text = text_encoders(self.train)
        self.model = Animator(moving_unet(self.train, self.size // factor_of(self.vae.config)), self.text)
        self.frozen = [self.vae]
        if not self.text.own and train.data.text_states is None:
            self.frozen += self.text.modules
        elif not self.text.own:
            self.text.to(torch.device("cpu"))
        self.process = process_of(self.train, self.size, exact=False)
        check_all_steps(train, self.process.scheduler())

    @classmethod
    def encoder(cls, train: TrainConfig) -> ClipEncoder:
        settings: VideoSettings = train.settings
        return ClipEncoder(str(image_product(settings)), FIELD, settings.frames, settings.fps)

    @classmethod
    def text_encoder(cls, train: TrainConfig) -> TextEncoders | None:
        """Return the image run's text encoder, whose states can be precomputed; None if it is trained."""
        encoders = text_encoders(train.settings)
        return None if encoders.own else encoders.to(torch.device("cpu"))

    def start_from(self, product: Path) -> None:
        load_parts(dict(self.model.named_children()), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch: Batch = {**self.text.ids([sample.text for sample in samples]), **states_of(samples)}
        latents = [sample.latent for sample in samples if sample.latent is not None]
        if latents:
            batch["latents"] = torch.from_numpy(np.stack(latents))
            still = np.array([is_image(latent) for latent in latents])
        else:
            size = (self.size, self.size)
            clips, still = clips_of(samples, self.train.frames, self.train.fps, size, self.train.part)
            batch["pictures"] = torch.from_numpy(clips)
        return batch | {"still": torch.from_numpy(still)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype, still = next(model.parameters()).dtype, batch["still"]
        latents = self._latents(batch, draw)
        task = self.process.draw(latents, draw)
        dropped = drop_rows(len(latents), self.train.drop_text, draw)
        text = self.text.given(batch, dropped)
        prediction = model(task.noisy.to(dtype), task.timesteps, text, still)
        first = task.target[:, :, :1].expand_as(task.target)  # of an image only the first frame is one
        target = torch.where(still.view(-1, 1, 1, 1, 1), first, task.target)
        source = "the stored latents" if "latents" in batch else f"the image run's autoencoder ({FIELD})"
        self.finite = {source: finite([latents]), "the network (unet)": finite([prediction.detach()])}
        errors = PerSampleLoss(sample_mse(prediction.detach(), target), task.timesteps / STEPS)
        metrics = {"text_dropped": dropped.float().mean(), "images": still.float().mean(), "loss_by_time": errors}
        return weighted_mse(prediction, target, task.weight), metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of an AnimateDiffPipeline with the EMA's weights."""
        from diffusers import AnimateDiffPipeline

        encoder, trained = self.text.encoders[0], getattr(model, self.text.encoders[0].slot.name)
        pipeline = AnimateDiffPipeline(
            vae=self.vae.to("cpu"),
            text_encoder=encoder.encoder.to("cpu") if trained is None else trained,
            tokenizer=encoder.tokenizer,
            unet=model.unet,
            motion_adapter=None,
            scheduler=self.process.scheduler(),
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        facts = {"size": self.size, "frames": self.train.frames, "fps": self.fps}
        sampling = self.train.sampling.model_dump(exclude={"sampler"})
        write_facts(folder, family=self.name, **facts, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> ClipDrawer:
        return ClipDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        return export_product(product, folder, precision, sampler)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        encoder = self.text.encoders[0]
        lengths = [encoder.tokens(text) for _, text in some_captions(samples)]
        hint = "write shorter captions, or start from an image run with a larger train.diffusion.text.length"
        warn_of_cut(self.name, lengths, encoder.longest, hint)

    def describe(self) -> dict[str, Any]:
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        side = self.size // factor_of(self.vae.config)
        latents = [self.vae.config.latent_channels, self.train.frames, side, side]
        return super().describe() | {"trained": trained, "size": self.size, "latents": latents, "fps": self.fps}

    def _latents(self, batch: Batch, draw: torch.Generator) -> torch.Tensor:
        """Return the network's latents [B, C, frames, h, w]: sampled from the posteriors, scaled; float32."""
        if "latents" in batch:  # stored: mean, then standard deviation, along the channels
            mean, std = batch["latents"].float().chunk(2, dim=2)
        else:
            pictures = batch["pictures"]
            images = to_signed(pictures.flatten(0, 1)).to(self.vae.dtype)
            exact = outside_autocast(images.device) if needs_upcast(self.vae) else contextlib.nullcontext()
            with torch.no_grad(), exact:
                posterior = self.vae.encode(images).latent_dist
            shape = (*pictures.shape[:2], *posterior.mean.shape[1:])
            mean, std = posterior.mean.float().view(shape), posterior.std.float().view(shape)
        noise = normal(mean.shape, draw)
        return ((mean + std * noise) * self.vae.config.scaling_factor).transpose(1, 2).contiguous()
