"""Base of the families that draw pixels from noise

    loss = ‖prediction − target‖²  (Ho et al. 2020, eq. 14)  + λ · the variational bound, if the variance is learned

Image and noise are mixed in pixels, so there is no autoencoder, and no ceiling but the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from capstan.training.config import TrainConfig
from capstan.training.config.families import traits_of
from capstan.training.data.transforms import batch_of, image_size, to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.diffusion.denoiser import Denoiser
from capstan.training.models.diffusion.text_encoders import TextEncoders, Texts
from capstan.training.models.load_parts import load_parts
from capstan.training.models.noise.objectives import drop_rows, predicted_x0, sample_mse, weighted_mse
from capstan.training.models.noise.process import Task
from capstan.training.models.noise.schedulers import STEPS, check_all_steps
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.models.pixels.settings import CHANNELS, PixelSettings
from capstan.training.models.pixels.unet import PixelNet
from capstan.training.models.pixels.variance import Posterior
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.precomputed.text_embeddings import states_of
from capstan.training.product import quieten, read_facts


class PixelFamily(Family):
    """A family that trains a UNet on pixels. A derived class chooses network, noise, and text encoders."""

    draws: ClassVar[Kind | None] = "image"
    train: PixelSettings

    @classmethod
    def size_of(cls, train: TrainConfig, samples: Samples) -> int:
        """Return the side in pixels to train at. Raises RecipeError if the network cannot halve it."""
        settings: PixelSettings = train.settings
        multiple = 2 ** (len(settings.unet.block_out_channels) - 1)
        return image_size(samples, settings.size, multiple, f"train.{traits_of(train.model).name}.size")

    def build(
        self, train: TrainConfig, assets: Path, process: PixelDdpm, backbone: PixelNet, text: TextEncoders
    ) -> None:
        """Build the model; the first thing that `__init__` does, with `assets` that hold the image's size."""
        quieten()
        self.train, self.process, self.backbone, self.text = train.settings, process, backbone, text
        self.size = int(read_facts(assets)["size"])
        check_all_steps(train, process.scheduler())
        net = backbone.build(LatentSpec.of(CHANNELS, self.size, text.encoders))
        self.model = Denoiser(backbone, net, text)
        self.frozen = [] if text.own or train.data.text_states is not None else text.modules
        self.posterior = Posterior(process.alphas) if self.train.variance == "learned" else None

    def start_from(self, product: Path) -> None:
        load_parts(dict(self.model.named_children()), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        images = batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip)
        return {"pictures": images, **self.text.ids([sample.text for sample in samples]), **states_of(samples)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        images = to_signed(batch["pictures"]).float()
        task = self.process.draw(images, draw)
        text, metrics = self.texts(batch, len(images), draw)
        given, conditions = self.network_input(task.noisy, batch, draw)
        output = model(given.to(dtype), task.timesteps, text, conditions)
        self.finite = {"the network (unet)": finite([output.detach()])}
        prediction = output[:, :CHANNELS]
        metrics["loss_by_time"] = PerSampleLoss(sample_mse(prediction.detach(), task.target), task.timesteps / STEPS)
        loss = weighted_mse(prediction, task.target, task.weight)
        if self.posterior is None:
            return loss, metrics
        bound = self._bound(self.posterior, images, task, output)
        metrics |= {"mse": loss.detach(), "bound": bound.detach()}  # the bound in bits per value
        return loss + self.train.bound * bound, metrics

    def network_input(
        self, noisy: torch.Tensor, batch: Batch, draw: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the network's input [B, C, h, w] and its further conditions [B, ...], or None."""
        return noisy, None

    def _bound(self, posterior: Posterior, images: torch.Tensor, task: Task, output: torch.Tensor) -> torch.Tensor:
        """Return the variational bound, which teaches only the variance: the mean enters without gradient."""
        times, alpha = task.timesteps, self.process.alphas.to(images.device)[task.timesteps]
        mean, raw = output[:, :CHANNELS].detach().float(), output[:, CHANNELS:]
        guess = predicted_x0(self.train.noise.prediction, mean, task.noisy, alpha)
        return posterior.bound(images, task.noisy, times, guess, raw).mean()

    def texts(self, batch: Batch, count: int, draw: torch.Generator) -> tuple[Texts, dict[str, Any]]:
        """Return the model's text input (ids, or frozen states) with some captions emptied, and metrics."""
        if not self.text.encoders:
            return {}, {}
        dropped = drop_rows(count, self.train.drop_text, draw)
        return self.text.given(batch, dropped), {"text_dropped": dropped.float().mean()}

    def pipeline_parts(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the parts of the diffusers pipeline by name, with the weights of `model`."""
        net: Any = model
        parts = {"scheduler": self.process.scheduler(), "unet": net.net}
        for encoder in self.text.encoders:
            trained = getattr(model, encoder.slot.name)
            parts[encoder.slot.name] = encoder.encoder.to("cpu") if trained is None else trained
            parts[encoder.slot.tokenizer] = encoder.tokenizer
        return parts

    def warn_of_cut_texts(self, samples: Samples, hint: str) -> None:
        """Warn of captions that are longer than a text encoder reads."""
        for encoder in self.text.encoders:
            lengths = [encoder.tokens(text) for _, text in some_captions(samples)]
            warn_of_cut(self.name, lengths, encoder.longest, hint)

    def describe(self) -> dict[str, Any]:
        facts = super().describe() | {"size": self.size, "variance": self.train.variance}
        return facts | ({"vocabulary": len(self.text.encoders[0].tokenizer)} if self.text.encoders else {})
