"""The family `ddpm`: images → a model that draws pixels from noise, with or without text (Ho et al. 2020).

    loss = ‖prediction − target‖²  (eq. 14)  + λ · the variational bound, if the variance is learned (variance.py)

Image and noise are mixed in pixels, so there is no autoencoder, and no ceiling but the data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.data.transforms import batch_of, image_size, to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.family import Batch, Family, Metrics, PerSampleLoss, Sample, Samples, finite
from capstan.training.models.ddpm.backbones import PixelNet, UnconditionalNet
from capstan.training.models.ddpm.config import DdpmSettings
from capstan.training.models.ddpm.drawer import PixelDrawer, add_code
from capstan.training.models.ddpm.process import PixelDdpm
from capstan.training.models.ddpm.variance import Posterior
from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.diffusion.denoiser import Denoiser
from capstan.training.models.diffusion.text_encoders import TextEncoders, Texts, new_encoders, open_encoders
from capstan.training.models.noise.drawer import export_pipeline
from capstan.training.models.noise.objectives import drop_rows, predicted_x0, sample_mse, weighted_mse
from capstan.training.models.noise.process import Task
from capstan.training.models.noise.schedulers import STEPS, check_steps
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.product import quieten, read_facts, write_facts

_TOKENIZER = "tokenizer"
_CHANNELS = 3


class DdpmFamily(Family):
    """The family that trains a UNet on pixels, and a text encoder with it unless a frozen one is given."""

    name: ClassVar[str] = "ddpm"
    settings: ClassVar[type[Section]] = DdpmSettings
    draws: ClassVar[Kind | None] = "image"

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the image size, and the tokenizer of a text encoder that is trained."""
        settings: DdpmSettings = train.settings
        levels = len(settings.unet.block_out_channels)
        size = image_size(samples, settings.size, 2 ** (levels - 1), "train.ddpm.size")
        if settings.text is not None and settings.text.pretrained is None:
            Tokenizer.train(samples.captions(), settings.text.vocab_size).save(folder / _TOKENIZER)
        write_facts(folder, size=size)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: DdpmSettings = train.settings
        self.size = int(read_facts(assets)["size"])
        self.process = PixelDdpm(self.train)
        _check_steps(train, self.process.scheduler())
        self.backbone = UnconditionalNet(self.train) if self.train.text is None else PixelNet(self.train)
        with _named_here():
            self.text = self._text_encoders(assets)
            net = self.backbone.build(LatentSpec.of(_CHANNELS, self.size, self.text.encoders))
        self.model = Denoiser(self.backbone, net, self.text)
        self.frozen = [] if self.text.own else self.text.modules
        self.nothing = self.text.ids([""])  # each [1, L]; empty without text
        self.posterior = Posterior(self.process.alphas) if self.train.variance == "learned" else None

    def _text_encoders(self, assets: Path) -> TextEncoders:
        settings = self.train.text
        if settings is None:
            return TextEncoders([], own=True)
        if settings.pretrained is not None:
            return open_encoders(self.backbone.slots, settings)
        return new_encoders(self.backbone.slots, settings, assets / _TOKENIZER)

    def start_from(self, product: Path) -> None:
        try:
            for name, module in self.model.named_children():
                module.load_state_dict(type(module).from_pretrained(product / name).state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"{product} has a different shape ({error})"
            raise RecipeError("train.init", problem, "use the settings of that run") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        images = batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip)
        return {"pictures": images, **self.text.ids([sample.text for sample in samples])}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        dtype = next(model.parameters()).dtype
        images = to_signed(batch["pictures"]).float()
        task = self.process.draw(images, draw)
        text, metrics = self._texts(batch, len(images), draw)
        output = model(task.noisy.to(dtype), task.timesteps, text)
        self.finite = {"the network (unet)": finite([output.detach()])}
        prediction = output[:, :_CHANNELS]
        metrics["loss_by_time"] = PerSampleLoss(sample_mse(prediction.detach(), task.target), task.timesteps / STEPS)
        loss = weighted_mse(prediction, task.target, task.weight)
        if self.posterior is None:
            return loss, metrics
        bound = self._bound(self.posterior, images, task, output)
        metrics |= {"mse": loss.detach(), "bound": bound.detach()}  # the bound in bits per value
        return loss + self.train.bound * bound, metrics

    def _bound(self, posterior: Posterior, images: torch.Tensor, task: Task, output: torch.Tensor) -> torch.Tensor:
        """Return the variational bound, which teaches only the variance: the mean enters without gradient."""
        times, alpha = task.timesteps, self.process.alphas.to(images.device)[task.timesteps]
        mean, raw = output[:, :_CHANNELS].detach().float(), output[:, _CHANNELS:]
        guess = predicted_x0(self.train.noise.prediction, mean, task.noisy, alpha)
        return posterior.bound(images, task.noisy, times, guess, raw).mean()

    def _texts(self, batch: Batch, count: int, draw: torch.Generator) -> tuple[Texts, dict[str, Any]]:
        """Return the model's text input (ids, or frozen states) with some captions emptied, and metrics."""
        if self.train.text is None:
            return {}, {}
        dropped = drop_rows(count, self.train.drop_text, draw)
        ids = {
            name: torch.where(dropped[:, None], nothing.to(dropped.device), batch[name])
            for name, nothing in self.nothing.items()
        }
        return ids if self.text.own else self.text.states(ids), {"text_dropped": dropped.float().mean()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the folder of a diffusers pipeline with the EMA's weights."""
        parts = {"scheduler": self.process.scheduler(), "unet": model.net}
        for encoder in self.text.encoders:
            trained = getattr(model, encoder.slot.name)
            parts[encoder.slot.name] = encoder.encoder.to("cpu") if trained is None else trained
            parts[encoder.slot.tokenizer] = encoder.tokenizer
        self.backbone.pipeline(parts).save_pretrained(folder, safe_serialization=True)
        sampling = self.train.sampling.model_dump(exclude={"sampler"})
        write_facts(folder, family=self.name, size=self.size, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> PixelDrawer:
        return PixelDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write a DDPMPipeline; with text, a pipeline whose code lies in the folder."""
        drawer = PixelDrawer(product, torch.device("cpu"))
        if sampler is not None:
            drawer.use_sampler(sampler)
        written = export_pipeline(drawer.pipeline, folder, precision)
        if drawer.prompted:
            add_code(folder)
        return written

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        for encoder in self.text.encoders:
            lengths = [encoder.tokens(text) for _, text in some_captions(samples)]
            hint = "raise train.ddpm.text.length in a new run, or write shorter captions"
            warn_of_cut(self.name, lengths, encoder.longest, hint)

    def describe(self) -> dict[str, Any]:
        facts = super().describe() | {"size": self.size, "variance": self.train.variance}
        return facts | ({"vocabulary": len(self.text.encoders[0].tokenizer)} if self.text.encoders else {})


def _check_steps(train: TrainConfig, scheduler: Any) -> None:
    """Raise RecipeError if a number of sampling steps of the recipe is more than the schedule has."""
    check_steps(scheduler, train.settings.sampling.steps, "train.ddpm.sampling.steps")
    for name, section in (("samples", train.watch.samples), ("evaluate", train.watch.evaluate)):
        if section is not None and section.steps is not None:
            check_steps(scheduler, section.steps, f"train.watch.{name}.steps")


@contextlib.contextmanager
def _named_here() -> Iterator[None]:
    """Name fields of the family diffusion, whose parts are used, as this family's."""
    try:
        yield
    except RecipeError as error:
        field = error.field.replace("train.diffusion.", "train.ddpm.", 1)
        raise RecipeError(field, error.problem, error.hint) from None
