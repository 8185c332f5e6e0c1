"""The family `dalle`: captions and images' tokens → a transformer that writes images (Ramesh et al. 2021, section 2.2).

loss = 1/8 · mean over text tokens −log p(token | before)  +  7/8 · mean over image tokens −log p(token | before)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.data.transforms import batch_of, to_signed
from capstan.training.drawing.drawer import Kind
from capstan.training.draws import uniform
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.autoencoder.first_stage import load_weights
from capstan.training.models.dalle.config import DalleSettings
from capstan.training.models.dalle.drawer import DalleDrawer, load_model, save_product
from capstan.training.models.dalle.janus import export_janus
from capstan.training.models.dalle.model import Dalle, Shape
from capstan.training.models.dalle.tokens import emptied, nothing, open_first_stage, prompt_ids
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.models.vqgan.encoder import TokenEncoder
from capstan.training.precomputed.latents import check_latents, measure
from capstan.training.product import quieten, read_facts, write_facts

_TOKENIZER = "tokenizer"
_FIELD = "train.dalle.first_stage"


class DalleFamily(Family):
    """The family that trains a transformer over captions and the codes of a first stage."""

    name: ClassVar[str] = "dalle"
    settings: ClassVar[type[Section]] = DalleSettings
    draws: ClassVar[Kind | None] = "image"

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the tokenizer, learnt from the captions, and the image size, which is the first stage's."""
        settings: DalleSettings = train.settings
        encoder = cls.encoder(train)
        size, identity = measure(train, encoder, samples)
        if size != encoder.codec.size:
            problem = f"{size} pixels, and the first stage was trained on {encoder.codec.size}"
            raise RecipeError("train.dalle.size", problem, f"set size: {encoder.codec.size}")
        check_latents(train, identity)
        Tokenizer.train(samples.captions(), settings.text.vocab_size).save(folder / _TOKENIZER)
        write_facts(folder, size=size)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        quieten()
        self.train: DalleSettings = train.settings
        self.tokenizer = Tokenizer.load(assets / _TOKENIZER)
        self.stage = open_first_stage(self.train.first_stage, _FIELD)
        self.size = int(read_facts(assets)["size"])
        self.side = self.size // self.stage.factor
        self.model = Dalle(
            Shape(
                vocabulary=nothing(self.tokenizer) + 1,
                codes=self.stage.codes,
                code_channels=self.stage.channels,
                width=self.train.width,
                layers=self.train.layers,
                heads=self.train.heads,
                mlp=self.train.mlp_width,
                positions=self.train.text.length + self.side**2,
            )
        )
        self.frozen = [self.stage.model] if train.data.latents is None else []

    @classmethod
    def encoder(cls, train: TrainConfig) -> TokenEncoder:
        return TokenEncoder(open_first_stage(train.settings.first_stage, _FIELD), _FIELD)

    def start_from(self, product: Path) -> None:
        load_weights(self.model, load_model(product).state_dict(), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        ids, mask = prompt_ids(self.tokenizer, [sample.text for sample in samples], self.train.text.length)
        batch: Batch = {"ids": ids, "mask": mask}
        latents = [sample.latent for sample in samples if sample.latent is not None]
        if latents:
            return batch | {"tokens": torch.from_numpy(np.stack(latents)).long()}
        return batch | {"pictures": batch_of(samples, self.size, crop=self.train.crop)}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        ids, mask = batch["ids"], batch["mask"]
        if "tokens" in batch:
            tokens = batch["tokens"].flatten(1)
        else:
            with torch.no_grad():
                tokens = self.stage.tokens(to_signed(batch["pictures"])).flatten(1)
        dropped = uniform((len(ids),), draw) < self.train.drop_text
        found = model(emptied(ids, self.tokenizer, dropped), mask, tokens)
        self.finite = {"the transformer": finite([found.text, found.image])}
        # Of a caption that is not shown nothing can be learnt; the loss stays a mean over samples.
        shown = (mask[:, 1:] * mask[:, :-1]) * ~dropped[:, None]
        text = (_entropy(found.text, ids[:, 1:]) * shown).sum(1) / (mask.sum(1) - 1)
        image = _entropy(found.image, tokens).mean(1)
        weight = self.train.text_weight
        metrics = {"text": text.detach().mean(), "image": image.detach().mean()}
        metrics["token_accuracy"] = (found.image.detach().argmax(-1) == tokens).float().mean()
        return (weight * text + (1 - weight) * image).mean(), metrics

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the transformer, its tokenizer and its first stage."""
        save_product(model, folder, self.tokenizer, self.train.first_stage)
        sampling = self.train.sampling.model_dump()
        write_facts(folder, family=self.name, size=self.size, length=self.train.text.length, sampling=sampling)

    @classmethod
    def open(cls, product: Path, device: torch.device) -> DalleDrawer:
        return DalleDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the folder of transformers' JanusForConditionalGeneration. Raises RecipeError if it cannot decode."""
        return export_janus(product, folder, precision=precision, sampler=sampler)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text is."""
        lengths = [2 + len(self.tokenizer.ids(text)) for _, text in some_captions(samples)]
        hint = "raise train.dalle.text.length in a new run, or write shorter captions"
        warn_of_cut(self.name, lengths, self.train.text.length, hint)

    def describe(self) -> dict[str, Any]:
        facts = {"size": self.size, "tokens": self.side**2, "codes": self.stage.codes}
        return {**super().describe(), **facts, "vocabulary": self.tokenizer.vocab_size}


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return −log p of each label: [B, T, K] and [B, T] → [B, T]."""
    return F.cross_entropy(logits.float().movedim(-1, 1), labels, reduction="none")
