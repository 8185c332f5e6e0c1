"""The family `damsm`: captioned images → a model that says how well an image and a text fit (Xu et al. 2018).

Its loss compares all images with all captions of a batch, word by word and as a whole (losses.py). AttnGAN learns by
it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.data.transforms import batch_of, image_size, to_signed
from capstan.training.distributed.step import Step
from capstan.training.drawing.drawer import Matcher
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.autoencoder.first_stage import load_weights
from capstan.training.models.damsm.config import DamsmSettings
from capstan.training.models.damsm.losses import matched, share_gradients
from capstan.training.models.damsm.modeling_attngan import DamsmConfig, DamsmModel, split
from capstan.training.models.own_model import export_own, load_own
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.product import read_facts, write_facts


class DamsmFamily(Family):
    """The family that trains a text and an image encoder on captioned images."""

    name: ClassVar[str] = "damsm"
    settings: ClassVar[type[Section]] = DamsmSettings

    train: DamsmSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write the image size and the vocabulary."""
        settings: DamsmSettings = train.settings
        size = image_size(samples, settings.size, 2 ** len(settings.tower), "train.damsm.size")
        write_facts(folder, size=size, vocabulary=vocabulary_of(samples.captions(), settings.vocabulary))

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train = train.settings
        facts = read_facts(assets)
        self.size = int(facts["size"])
        shape = self.train.model_dump(include={"words", "channels", "tower"})
        self.model = DamsmModel(DamsmConfig(facts["vocabulary"], image_size=self.size, **shape))

    def start_from(self, product: Path) -> None:
        load_weights(self.model, load_own(DamsmModel, product, "train.init").state_dict(), product)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        images = batch_of(samples, self.size, crop=self.train.crop, flip=self.train.flip)
        return {"pictures": images, "ids": self.model.text.ids([sample.text for sample in samples])}

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:
        share_gradients(parts, step, lambda part: _encoded(model, part), self.train)

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        features = _encoded(model, batch)
        mask = features.pop("mask")
        self.finite = {"the image encoder": finite([features["regions"], features["images"]])}
        self.finite |= {"the text encoder": finite([features["words"], features["sentences"]])}
        loss, found = matched(features, mask, batch, self.train)
        return loss, {"words": found.words, "sentences": found.sentences, "matched": found.accuracy}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        assert isinstance(model, DamsmModel)
        model.save_pretrained(folder)
        gammas = self.train.model_dump(include={"gamma", "gamma_words", "gamma_regions"})
        write_facts(folder, family=self.name, size=self.size, matching=gammas)

    @classmethod
    def matcher(cls, product: Path, device: torch.device) -> Matcher:
        return DamsmMatcher(load_own(DamsmModel, product, "RUN").to(device))

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write the model with its code, which transformers' AutoModel opens."""
        return export_own(DamsmModel, product, folder, precision=precision, sampler=sampler)

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the text encoder reads."""
        lengths = [len(split(text)) for _, text in some_captions(samples)]
        warn_of_cut(self.name, lengths, self.train.words, "raise train.damsm.words in a new run")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"size": self.size, "vocabulary": len(self.model.config.vocabulary)}


class DamsmMatcher:
    """An opened DAMSM."""

    def __init__(self, model: DamsmModel) -> None:
        self.model, self.size = model, int(model.config.image_size)

    def similarity(self, images: np.ndarray, texts: Sequence[str], batch: int) -> np.ndarray:
        rows = []
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch):
            rows.append(self.model.similarity(to_signed(part.to(self.model.device)), texts).cpu())
        scores: np.ndarray = torch.cat(rows).numpy()
        return scores


def vocabulary_of(captions: Iterable[str], most: int) -> list[str]:
    """Return the most frequent words of captions, at most `most`; words that are equally frequent by the alphabet."""
    counts = Counter(word for caption in captions for word in split(caption))
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def _encoded(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Return regions, images, words and sentences of a part, and the words' mask."""
    images = to_signed(batch["pictures"]).to(next(model.parameters()).dtype)
    regions, whole, words, sentences = model(images, batch["ids"])
    features: Mapping[str, torch.Tensor] = {
        "regions": regions, "images": whole, "words": words, "sentences": sentences
    }  # fmt: skip
    return {**features, "mask": batch["ids"] > 0}
