"""The family `oobleck`: sounds → a trained AutoencoderOobleck of diffusers (Evans et al. 2024, Stable Audio).

Loss = waveform · squared error + spectral · multi-resolution STFT loss + kl · KL of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.sounds import Form, batch_of, form_of, pieces_of, to_wave
from capstan.training.drawing.drawer import SoundCodec
from capstan.training.draws import normal
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.oobleck.config import OobleckSettings
from capstan.training.models.oobleck.model import (
    Oobleck,
    build,
    kl_divergence,
    reconstruct,
    settle,
    signal_to_noise,
    spectral_difference,
    standardise,
)
from capstan.training.product import find_product, read_facts, write_facts

_SOUNDS: Final = "sounds.npy"  # int16 [N, channels, values]: the sounds that latents are measured on


class OobleckFamily(Family):
    """The family that trains an AutoencoderOobleck on the dataset's sounds."""

    name: ClassVar[str] = "oobleck"
    settings: ClassVar[type[Section]] = OobleckSettings
    captions: ClassVar[bool] = OobleckSettings.captions
    reads: ClassVar[tuple[str, ...]] = OobleckSettings.reads

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Save the sounds that latents are measured on; this fixes the sounds' form."""
        settings: OobleckSettings = train.settings
        form = form_of(samples, settings, settings.hop, f"train.{cls.name}")
        count = min(settings.statistics, len(samples))
        chosen = [samples.sample(number * len(samples) // count) for number in range(count)]
        np.save(folder / _SOUNDS, batch_of(pieces_of(chosen, form)).numpy())
        whole = form_of(samples, settings.model_copy(update={"seconds": None}), settings.hop, f"train.{cls.name}")
        write_facts(folder, rate=form.rate, channels=form.channels, values=form.values, whole=whole.values)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train: OobleckSettings = train.settings
        facts = read_facts(assets)
        self.form = Form(facts["rate"], facts["channels"], facts["values"])
        self.whole = int(facts.get("whole", self.form.values))
        self.sounds = np.load(assets / _SOUNDS, mmap_mode="r")
        self.model = Oobleck(build(self.train.shape(), channels=self.form.channels, rate=self.form.rate))

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module:
        settings: OobleckSettings = train.settings
        model: torch.nn.Module = build(settings.shape(), channels=settings.channels or 2, rate=settings.rate or 44_100)
        return model

    def start_from(self, product: Path) -> None:
        try:
            self.model.vae.load_state_dict(load_oobleck(str(product), "train.init").state_dict())
        except RuntimeError as error:
            problem = f"{product} has a different shape ({error})"
            raise RecipeError("train.init", problem, "use the settings of that run") from None
        settle(self.model)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        return {"sounds": batch_of(pieces_of(samples, self.form, self.train.part))}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        sounds = to_wave(batch["sounds"])
        shape = (len(sounds), self.train.encoder_hidden_size // 2, self.form.values // self.train.hop)
        made, mean, std = model(sounds.to(next(model.parameters()).dtype), normal(shape, draw))
        self.finite = {"the encoder": finite([mean, std]), "the decoder": finite([made])}
        waveform, kl = (made.float() - sounds).square().mean(), kl_divergence(mean, std)
        loss = self.train.waveform * waveform + self.train.kl * kl
        metrics = {"waveform": waveform.detach(), "kl": kl.detach(), "snr": signal_to_noise(made.detach(), sounds)}
        if self.train.spectral:
            spectral = spectral_difference(made, sounds, self.train.fft_sizes)
            loss, metrics["spectral"] = loss + self.train.spectral * spectral, spectral.detach()
        return loss, metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write an AutoencoderOobleck folder whose latents have a mean square of 1 on the dataset's sounds."""
        vae, sounds = model.vae, to_wave(torch.from_numpy(np.array(self.sounds)))
        settle(vae)
        scale = standardise(vae, sounds)
        vae.save_pretrained(folder, safe_serialization=True)
        write_facts(folder, family=self.name, values=self.whole, latents_before=scale.tolist())

    @classmethod
    def codec(cls, product: Path, device: torch.device) -> OobleckCodec:
        return OobleckCodec(load_oobleck(str(product), "RUN").to(device), product)

    def describe(self) -> dict[str, Any]:
        latents = [self.train.encoder_hidden_size // 2, self.form.values // self.train.hop]
        return {**super().describe(), "rate": self.form.rate, "seconds": self.form.seconds, "latents": latents}


class OobleckCodec(SoundCodec):
    """An opened AutoencoderOobleck."""

    def __init__(self, vae: Any, product: Path) -> None:
        self.vae = vae
        self.rate, self.channels = int(vae.config.sampling_rate), int(vae.config.audio_channels)
        self.values = int(read_facts(product).get("values", vae.hop_length * (self.rate // vae.hop_length)))

    def reconstruct(self, sounds: np.ndarray, batch: int) -> np.ndarray:
        made: np.ndarray = (
            reconstruct(self.vae, torch.from_numpy(sounds).permute(0, 2, 1), batch).permute(0, 2, 1).numpy()
        )
        return made


def load_oobleck(path: str, field: str) -> Any:
    """Load the AutoencoderOobleck at `path`: a run, a product, or the vae/ of a pipeline. Raises RecipeError."""
    from diffusers import AutoencoderOobleck

    folder = find_product(path, field)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    try:
        vae = AutoencoderOobleck.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        problem = f"{folder} is not an AutoencoderOobleck ({error})"
        raise RecipeError(field, problem, "name a run of model: oobleck") from None
    settle(vae)
    return vae
