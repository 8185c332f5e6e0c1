"""The family `diffusion`: captioned pictures → a text-to-image pipeline in diffusers' format.

picture ─frozen autoencoder─▶ latent ─process─▶ noisy latent, time ─┐
caption ─tokenizer─▶ ids ─(some emptied)─▶ text encoder ─────────┴▶ UNet ─▶ prediction; loss = mean squared error
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.config import Section, fingerprint
from pipeline.errors import RecipeError
from recaption.upsample import Style
from training.autoencoder.family import factor_of, load_autoencoder
from training.config import TrainConfig
from training.diffusion.model import Denoiser, build_text_encoder, build_unet, load_text_encoder, load_tokenizer
from training.diffusion.process import STEPS, process_of
from training.diffusion.settings import DiffusionSettings
from training.family import Batch, Family, Metrics, Sample, Samples, Spread
from training.latents import encoder_identity
from training.objectives import drop_rows, sample_mse, weighted_mse
from training.pixels import batch_of, picture_size, to_signed
from training.product import find_product, quieten, read_facts, write_facts
from training.tokenizer import Tokenizer

_TOKENIZER = "tokenizer"
_STYLE_SAMPLES = 512  # captions that the style is measured on


class DiffusionFamily(Family):
    """Fits a UNet (and a text encoder, unless that is given) on the latents of a frozen autoencoder."""

    name: ClassVar[str] = "diffusion"
    settings: ClassVar[type[Section]] = DiffusionSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """The tokenizer, learnt from the captions (or that of the model to start from), and the size of pictures."""
        settings: DiffusionSettings = train.settings
        if settings.text.pretrained is None and train.init is not None:
            shutil.copytree(find_product(train.init, "train.init") / _TOKENIZER, folder / _TOKENIZER)
        elif settings.text.pretrained is None:
            Tokenizer.train(samples.captions(), settings.text.vocab_size).save(folder / _TOKENIZER)
        vae = load_autoencoder(settings.autoencoder, "train.diffusion.autoencoder")
        multiple = max(8, factor_of(vae.config))  # diffusers' pipelines draw in steps of 8 pixels
        size = picture_size(samples, settings.size, multiple, "train.diffusion.size")
        encoder, asked = fingerprint(encoder_identity(vae, size)), train.data.latents
        if asked not in (None, encoder):
            problem = f"{asked} are not of this autoencoder and picture size (those would be {encoder})"
            raise RecipeError("train.data.latents", problem, "run `capstan encode` and write the id that it prints")
        write_facts(folder, size=size, style=_style(samples).facts())

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: DiffusionSettings = train.settings
        self.vae = load_autoencoder(self.train.autoencoder, "train.diffusion.autoencoder")
        if self.vae.config.shift_factor:
            problem = "has a shift_factor, which diffusers' StableDiffusionPipeline does not apply"
            raise RecipeError("train.diffusion.autoencoder", problem, "name an autoencoder without one")
        self.assets = assets
        self.size = int(read_facts(assets)["size"])
        self.side = self.size // factor_of(self.vae.config)
        own = self.train.text.pretrained is None
        if own:
            self.tokenizer = load_tokenizer(assets / _TOKENIZER, self.train.text.length)
            self.text_encoder = build_text_encoder(self.train.text, self.tokenizer)
        else:
            self.text_encoder, self.tokenizer = load_text_encoder(
                str(self.train.text.pretrained), "train.diffusion.text.pretrained"
            )
        unet = build_unet(
            self.train.unet,
            channels=int(self.vae.config.latent_channels),
            side=self.side,
            text_width=int(self.text_encoder.config.hidden_size),
        )
        self.model = Denoiser(unet, self.text_encoder if own else None)
        self.frozen = [self.vae] if own else [self.vae, self.text_encoder]
        self.process = process_of(self.train)
        self.nothing = self._ids([""])  # [1, L]

    def start_from(self, product: Path) -> None:
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        try:
            self.model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(product / "unet").state_dict())
            if self.model.text_encoder is not None:
                text = CLIPTextModel.from_pretrained(product / "text_encoder")
                self.model.text_encoder.load_state_dict(text.state_dict())
        except (OSError, RuntimeError) as error:
            raise RecipeError("train.init", f"{product} has another shape ({error})", "use its settings") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        batch = {"ids": self._ids([sample.text for sample in samples])}
        latents = [sample.latent for sample in samples if sample.latent is not None]
        if latents:
            batch["latents"] = torch.from_numpy(np.stack(latents))
        else:
            batch["pictures"] = batch_of(samples, self.size, crop=self.train.crop)
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        task = self.process.draw(self._latents(batch, draw), draw)
        ids = batch["ids"]
        dropped = drop_rows(len(ids), self.train.drop_text, draw)
        text = torch.where(dropped[:, None], self.nothing.to(ids.device), ids)
        if self.model.text_encoder is None:
            with torch.no_grad():
                text = self.text_encoder(text)[0]
        prediction = model(task.noisy.to(dtype), task.timesteps, text)
        loss = weighted_mse(prediction, task.target, task.weight)
        by_time = Spread(sample_mse(prediction.detach(), task.target), task.timesteps / STEPS)
        return loss, {"text_dropped": dropped.float().mean(), "loss_by_time": by_time}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """A diffusers StableDiffusionPipeline folder with the EMA's UNet and text encoder."""
        from diffusers import StableDiffusionPipeline

        text_encoder = self.text_encoder if model.text_encoder is None else model.text_encoder
        pipeline = StableDiffusionPipeline(
            vae=self.vae.to("cpu"),
            text_encoder=text_encoder.to("cpu"),
            tokenizer=self.tokenizer,
            unet=model.unet,
            scheduler=self.process.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
        style = read_facts(self.assets).get("style")  # none in runs that were begun before it was measured
        facts = {"size": self.size, "sampling": self.train.sampling.model_dump()} | ({"style": style} if style else {})
        write_facts(folder, family=self.name, **facts)

    def describe(self) -> dict[str, Any]:
        facts = super().describe() | {"size": self.size, "latents": [self.vae.config.latent_channels, *[self.side] * 2]}
        facts["unet"] = sum(p.numel() for p in self.model.unet.parameters())
        return facts | {"vocabulary": len(self.tokenizer), "objective": self.train.objective}

    def _ids(self, texts: list[str]) -> torch.Tensor:
        """int64 [B, L], exactly as the pipeline will tokenize prompts."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids

    def _latents(self, batch: Batch, draw: torch.Generator) -> torch.Tensor:
        """Latents [B, C, h, w] as the UNet sees them: drawn from the posterior, times `scaling_factor`; float32."""
        if "latents" in batch:  # stored: mean and standard deviation, one after the other
            mean, std = batch["latents"].float().chunk(2, dim=1)
        else:
            with torch.no_grad():
                posterior = self.vae.encode(to_signed(batch["pictures"]).to(self.vae.dtype)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
        noise = torch.randn(mean.shape, generator=draw, device=mean.device)
        return (mean + std * noise) * self.vae.config.scaling_factor


def _style(samples: Samples) -> Style:
    """How the captions are written that the model will see most: those of one slot."""
    texts: dict[str, list[str]] = {}
    for index in range(0, len(samples), max(1, len(samples) // _STYLE_SAMPLES)):
        sample = samples.sample(index)
        texts.setdefault(sample.slot, []).append(sample.text)
    slot = max(texts, key=lambda name: len(texts[name]), default="")
    return Style.of(texts.get(slot, []))
