"""The family `text2scene`: captions and the column `objects` → a model that composes scenes

Loss of a sample (Tan et al. 2019, section 3.5), summed over its things t, T of them:

    − Σ_t log p(o_t) − Σ_t [log p(l_t) + Σ_k log p(R^k_t)] + λ_o C(α^o) + λ_a C(α^a)
    C(α) = Σ_i (τ − Σ_t α_ti)²         over the words i that count, τ = min(1, T / their number)

The paper has τ = 1 and all words. Each step gives 1 of attention, so that Σ_i Σ_t α_ti = T, and with more words than
things the sum cannot come near 0 (docs/text2scene.md).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch.nn import functional

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.drawing.drawer import Kind
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.own_model import export_own, load_own
from capstan.training.models.text2scene.config import Text2sceneSettings
from capstan.training.models.text2scene.drawer import SceneDrawer
from capstan.training.models.text2scene.modeling_text2scene import (
    END,
    Steps,
    Text2SceneConfig,
    Text2SceneModel,
    words_of,
)
from capstan.training.models.text2scene.vocabulary import (
    as_numbers,
    content_words,
    make_vocabulary,
    ordered,
    things_of,
)
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.product import FACTS, quieten, write_facts

logger = logging.getLogger(__name__)

_PARTS: Final = "parts"  # folder of a product, and of the assets
_FILE: Final = "scene.json"  # in the assets: the arguments of the model's config


class Text2sceneFamily(Family):
    """The family that trains a Text2SceneModel on the dataset's objects."""

    name: ClassVar[str] = "text2scene"
    settings: ClassVar[type[Section]] = Text2sceneSettings
    draws: ClassVar[Kind | None] = "scene"

    train: Text2sceneSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        settings: Text2sceneSettings = train.settings
        if settings.parts is not None:
            shutil.copytree(settings.parts, folder / _PARTS)
        made = make_vocabulary(settings, samples, folder)
        first = samples.sample(0)
        made |= {
            name: getattr(settings, name) for name in ("length", "width", "heads", "cells", "grid", "sizes", "most")
        }
        made["side"] = settings.size or min(first.width, first.height)
        (folder / _FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train = train.settings
        self.config = Text2SceneConfig(**json.loads((assets / _FILE).read_text(encoding="utf-8")))
        self.model = Text2SceneModel(self.config)
        self.parts = assets / _PARTS
        self.content = content_words(self.config)

    def start_from(self, product: Path) -> None:
        before = load_own(Text2SceneModel, product, "train.init")
        for name in ("words", "labels", "attributes"):
            if getattr(before.config, name) != getattr(self.config, name):
                problem = f"{product} knows other {name} than this dataset has"
                raise RecipeError("train.init", problem, "train on the dataset of that run, or remove init")
        try:
            self.model.load_state_dict(before.state_dict())
        except RuntimeError as error:
            problem = f"{product} has a different shape ({error})"
            raise RecipeError("train.init", problem, "use the settings of that run") from None

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        rows = [
            as_numbers(self.config, ordered(things_of(sample.extra, self.train.background), self.train))
            for sample in samples
        ]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        longest = int((batch["labels"] >= END).sum(1).max())  # steps after all scenes have ended change nothing
        batch = {name: values[:, :longest] for name, values in batch.items()}
        batch["boxes"] = _boxes(self.model, batch)
        return {"ids": self.config.ids([sample.text for sample in samples]), **batch}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        said: Steps = model(batch["ids"], batch["labels"], batch["attributes"], batch["boxes"])
        self.finite = {"the network (text2scene)": finite(said.places)}
        things = batch["labels"] > END
        parts = {
            "objects": _cross_entropy(said.labels, batch["labels"]),
            "places": _cross_entropy(said.places, batch["places"]),
            "attributes": said.places[0].new_zeros(len(things)),
            "sizes": said.places[0].new_zeros(len(things)),
        }
        for name, logits in (("attributes", said.attributes), ("sizes", said.sizes)):
            for k in range(batch[name].shape[2]):
                parts[name] = parts[name] + _cross_entropy([step[k] for step in logits], batch[name][:, :, k])
        loss = torch.stack(list(parts.values())).sum(0)
        weights = self.train.coverage
        for name, weight, attention, counts in (
            ("coverage_objects", weights.objects, said.on_objects, self.content[0]),
            ("coverage_attributes", weights.attributes, said.on_attributes, self.content[1]),
        ):
            counted = counts.to(things.device)[batch["ids"]] if weights.words == "content" else batch["ids"] > 0
            parts[name] = coverage(attention, things, counted, reachable=weights.words == "content")
            loss = loss + weight * parts[name]
        return loss.mean(), {name: part.detach().mean() for name, part in parts.items()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write a model of transformers, with its parts and facts."""
        assert isinstance(model, Text2SceneModel)
        quieten()
        model.save_pretrained(folder)
        if self.parts.is_dir():
            shutil.copytree(self.parts, folder / _PARTS)
        write_facts(folder, family=self.name, size=self.config.side, sampling=self.train.sampling.model_dump())

    @classmethod
    def open(cls, product: Path, device: torch.device) -> SceneDrawer:
        return SceneDrawer(product, device)

    @classmethod
    def export(cls, product: Path, folder: Path, *, precision: str = "fp32", sampler: str | None = None) -> str:
        """Write a model of transformers with its code, and what it draws with."""
        kind = export_own(Text2SceneModel, product, folder, precision=precision, sampler=sampler)
        shutil.copyfile(product / FACTS, folder / FACTS)
        if (product / _PARTS).is_dir():
            shutil.copytree(product / _PARTS, folder / _PARTS)
        return kind

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that are longer than the model reads."""
        lengths = [len(words_of(text)) for _, text in some_captions(samples)]
        warn_of_cut(self.name, lengths, self.config.length, "raise train.text2scene.length in a new run")

    def describe(self) -> dict[str, Any]:
        known = {name: len(values) - 1 for name, values in self.config.attributes.items()}
        return super().describe() | {"words": len(self.config.words), "labels": len(self.config.labels)} | known


def _boxes(model: Text2SceneModel, batch: Batch) -> torch.Tensor:
    """Return the boxes [B, T, 4] that places and sizes describe; empty ones where there is no thing."""
    count, steps = batch["places"].shape
    boxes = model.boxes(batch["places"].flatten(), batch["sizes"].flatten(0, 1)).view(count, steps, 4)
    return boxes * (batch["places"] >= 0)[:, :, None]


def _cross_entropy(logits: Sequence[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return − Σ_t log p(target) [B] over the steps that have a target [B, T]; −1 is none."""
    stacked = torch.stack(list(logits), 1).float()
    losses = functional.cross_entropy(stacked.transpose(1, 2), targets, ignore_index=-1, reduction="none")
    return losses.sum(1)


def coverage(
    attention: Sequence[torch.Tensor], things: torch.Tensor, counted: torch.Tensor, *, reachable: bool = True
) -> torch.Tensor:
    """Return Σ_i (τ − Σ_t α_ti)² [B] over the words that are counted [B, L], in the steps with things [B, T].

    τ = min(1, T / words) if `reachable`, so that the sum can be 0; else 1, as the paper prints it.
    """
    total = (torch.stack(list(attention), 1).float() * things[:, :, None]).sum(1)
    target = torch.ones_like(total[:, :1])
    if reachable:
        target = (things.sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)).clamp(max=1)
    return ((target - total).square() * counted).sum(1)
