"""The family `audiovideo`: captions → clips with their sound, one model over both latents

frames ─the image run's autoencoder─▶ latents ─┐                     ┌▶ coupling ─▶ velocity of the sound
sound ──first stage of sounds──▶ latents ──────┴─noise, one time t───┤     └─ features of each frame ─┐
caption ─tokenizer─▶ ids ─(some emptied)─▶ text encoder ─────────────┴▶ UNet with motion modules ─────┴▶ of the frames
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.clips import first_rate
from capstan.training.data.films import films_of
from capstan.training.data.sounds import Form, to_wave
from capstan.training.data.transforms import image_size, to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.audiovideo.config import AudiovideoSettings
from capstan.training.models.audiovideo.drawer import FilmDrawer
from capstan.training.models.audiovideo.modeling_audiovideo import (
    STEPS,
    AudioVideoConfig,
    AudioVideoModel,
    Denoiser,
)
from capstan.training.models.autoencoder.family import factor_of, load_autoencoder
from capstan.training.models.noise.objectives import drop_rows, flow_target, interpolate, sample_mse
from capstan.training.models.noise.process import Flow
from capstan.training.models.oobleck.family import load_oobleck
from capstan.training.models.own_model import export_own, load_own
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.models.video.motion import image_product, moving_unet, text_encoders
from capstan.training.product import FACTS, quieten, read_facts, write_facts

_SECTION: Final = "train.audiovideo"
_IDS: Final = "ids"  # of the image run's only text encoder
_TOKENIZER: Final = "tokenizer*"  # files of a tokenizer in a product


class AudiovideoFamily(Family):
    """The family that trains an image run's UNet with motion modules, and a transformer that couples it with sound."""

    name: ClassVar[str] = "audiovideo"
    settings: ClassVar[type[Section]] = AudiovideoSettings
    draws: ClassVar[Kind | None] = "film"
    reads: ClassVar[tuple[str, ...]] = AudiovideoSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the form of clips and sounds. Raises RecipeError where the parts do not fit each other."""
        settings: AudiovideoSettings = train.settings
        vae = load_autoencoder(str(image_product(settings, _SECTION)), f"{_SECTION}.after")
        factor, patch = factor_of(vae.config), settings.coupling.patch
        size = image_size(samples, settings.size, factor * patch, f"{_SECTION}.size")
        if (fps := settings.fps or first_rate(samples)) is None:
            hint = "build it from clips with source.parts: [mp4, flac]"
            raise RecipeError("dataset", "it has no clip", hint)
        sound = load_oobleck(settings.autoencoder, f"{_SECTION}.autoencoder")
        rate, hop = int(sound.config.sampling_rate), int(sound.hop_length) * settings.coupling.sound_patch
        values = int(settings.frames / fps * rate + 1e-6) // hop * hop
        if not values:
            problem = f"{settings.frames} frames at {fps:g} per second are shorter than a token of sound"
            raise RecipeError(f"{_SECTION}.frames", problem, "use more, or a smaller coupling.sound_patch")
        write_facts(folder, size=size, fps=fps, rate=rate, channels=int(sound.config.audio_channels), values=values)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: AudiovideoSettings = train.settings
        facts = read_facts(assets)
        self.size, self.fps = int(facts["size"]), float(facts["fps"])
        self.form = Form(facts["rate"], facts["channels"], facts["values"])
        self.vae = load_autoencoder(str(image_product(self.train, _SECTION)), f"{_SECTION}.after")
        self.oobleck = load_oobleck(self.train.autoencoder, f"{_SECTION}.autoencoder")
        self.text = text_encoders(self.train, _SECTION)
        encoder, unet = self.text.modules[0], moving_unet(self.train, self.size // factor_of(self.vae.config), _SECTION)
        halved = 2 ** (len(unet.config.block_out_channels) - 1)
        if self.train.coupling.patch % halved:
            problem = f"{self.train.coupling.patch} is no multiple of {halved}, by which the UNet's middle is smaller"
            raise RecipeError(f"{_SECTION}.coupling.patch", problem, f"use e.g. {2 * halved}")
        self.process = Flow(self.train.flow, size=self.size, exact=True)
        self.config = self._config(unet, encoder)
        self.model = Denoiser(unet, encoder, self.config)
        encoder.requires_grad_(self.text.own)
        self.frozen = [self.vae, self.oobleck]
        self.nothing = self.text.ids([""])[_IDS]

    def _config(self, unet: Any, encoder: Any) -> AudioVideoConfig:
        return AudioVideoConfig(
            unet=_shape(unet.config),
            text=_shape(encoder.config.to_diff_dict()),
            vae=_shape(self.vae.config),
            oobleck=_shape(self.oobleck.config),
            coupling=self.train.coupling.model_dump(),
            frames=self.train.frames,
            fps=self.fps,
            size=self.size,
            rate=self.form.rate,
            values=self.form.values,
            shift=self.process.shift,
            **self.train.sampling.model_dump(),
        )

    def start_from(self, product: Path) -> None:
        before = load_own(AudioVideoModel, product, "train.init")
        try:
            self.model.load_state_dict(before.denoiser.state_dict())
        except RuntimeError as error:
            problem = f"{product} has a different shape ({error})"
            raise RecipeError("train.init", problem, "use the settings of that run") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        size = (self.size, self.size)
        frames, sounds = films_of(samples, self.train.frames, self.fps, size, self.form, self.train.part)
        ids = self.text.ids([sample.text for sample in samples])[_IDS]
        return {"frames": torch.from_numpy(frames), "sounds": torch.from_numpy(sounds), "ids": ids}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        video, sound = self._latents(batch, draw)
        task = self.process.draw(video, draw)
        times, noise = task.timesteps / STEPS, normal(sound.shape, draw)
        dropped = drop_rows(len(video), self.train.drop_text, draw)
        ids = torch.where(dropped[:, None], self.nothing.to(dropped.device), batch["ids"])
        noisy = interpolate(sound, noise, times)
        seen, heard = model(task.noisy.to(dtype), noisy.to(dtype), times.to(dtype), ids)
        self.finite = {
            "the autoencoders": finite([video, sound]),
            "the coupling": finite([heard.detach()]),
            "the network (unet)": finite([seen.detach()]),
        }
        of_frames, of_sound = sample_mse(seen, task.target), sample_mse(heard, flow_target(sound, noise))
        errors = of_frames + self.train.sound * of_sound
        metrics = {"frames": of_frames.detach().mean(), "sound": of_sound.detach().mean()}
        more = {"text_dropped": dropped.float().mean(), "loss_by_time": PerSampleLoss(errors.detach(), times)}
        return errors.mean(), metrics | more

    def _latents(self, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents of the frames [B, C, F, h, w], sampled and scaled, and of the sounds [B, K, L]; float32."""
        frames = batch["frames"]
        images = to_signed(frames.flatten(0, 1).permute(0, 3, 1, 2)).to(self.vae.dtype)
        with torch.no_grad():
            posterior = self.vae.encode(images).latent_dist
            waves = to_wave(batch["sounds"]).transpose(1, 2).to(self.oobleck.dtype)
            sound = self.oobleck.encode(waves).latent_dist.mean.float()
        shape = (*frames.shape[:2], *posterior.mean.shape[1:])
        mean, std = posterior.mean.float().view(shape), posterior.std.float().view(shape)
        video = (mean + std * normal(shape, draw)) * self.vae.config.scaling_factor
        return video.transpose(1, 2).contiguous(), sound

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write a model of transformers with its autoencoders, tokenizer and facts."""
        whole = AudioVideoModel(self.config, model)  # type: ignore[arg-type]
        whole.vae, whole.oobleck = self.vae.to("cpu"), self.oobleck.to("cpu")
        whole.save_pretrained(folder)
        self.text.encoders[0].tokenizer.save_pretrained(folder)
        write_facts(folder, family=self.name, size=self.size, sampling=self.train.sampling.model_dump())

    @classmethod
    def open(cls, product: Path, device: torch.device) -> FilmDrawer:
        return FilmDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the model with its code, which transformers' AutoModel opens, and its tokenizer."""
        kind = export_own(AudioVideoModel, product, folder, precision=precision, sampler=sampler)
        for file in (product / FACTS, *product.glob(_TOKENIZER)):
            shutil.copyfile(file, folder / file.name)
        return kind

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        encoder = self.text.encoders[0]
        lengths = [encoder.tokens(text) for _, text in some_captions(samples)]
        hint = "write shorter captions, or start from an image run with a larger train.diffusion.text.length"
        warn_of_cut(self.name, lengths, encoder.longest, hint)

    def describe(self) -> dict[str, Any]:
        coupling = sum(weight.numel() for weight in self.model.coupling.parameters())
        return super().describe() | {
            "coupling": coupling,
            "size": self.size,
            "fps": self.fps,
            "rate": self.form.rate,
            "seconds": self.form.seconds,
        }


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what its library notes of versions and places."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
