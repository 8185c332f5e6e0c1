"""The family `captioner`: images and captions → a CoCa that writes captions.

Loss = contrastive · CLIP's contrastive loss + caption · cross-entropy of the next token (CoCa, eq. 4). Pre-training
uses both on web captions. Fine-tuning on a caption layer (`train.init`, `train.data.blend`) uses only the second, as
the DALL-E 3 paper does for its short and its descriptive captioner. Here one model learns both: each caption follows
its slot's prompt, which is not learnt itself; original captions (slot `original`) have no prompt.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.recaption import preprocess
from capstan.recaption.engines.coca import BPE_FILE, CONFIG_FILE, WEIGHTS_FILE
from capstan.training.config import ORIGINAL, TrainConfig
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.distributed.step import Step
from capstan.training.family import Batch, Family, Metrics, Sample, Samples, finite
from capstan.training.models.captioner import initialize
from capstan.training.models.captioner.config import CaptionerSettings
from capstan.training.models.captioner.contrast import Contrast, contrast, surrogate
from capstan.training.models.captioner.model import (
    IGNORED,
    LOGIT_SCALE,
    PAD,
    Captioner,
    caption_loss,
    initialize_coca,
    learnt_tokens,
)
from capstan.training.models.text_length import some_captions, warn_of_cut
from capstan.training.product import find_product, read_facts, write_facts

log = logging.getLogger(__name__)

_CLIP_VOCABULARY = 49408  # ids


class CaptionerFamily(Family):
    """The family that trains a CoCa, from scratch or from `train.init` (keeping its shape, vocabulary and prompts)."""

    name: ClassVar[str] = "captioner"
    settings: ClassVar[type[Section]] = CaptionerSettings

    @classmethod
    def make_assets(cls, train: TrainConfig, samples: Samples, folder: Path) -> None:
        """Write architecture and vocabulary: from `train.init`, else from the settings and the captions.

        Raises RecipeError if the settings contradict `train.init`.
        """
        settings: CaptionerSettings = train.settings
        if train.init is not None:
            product = find_product(train.init, "train.init")
            config = initialize.inherit(product, settings)
            if (product / BPE_FILE).is_file():
                shutil.copyfile(product / BPE_FILE, folder / BPE_FILE)
            prompts_of = {**settings.prompts, **read_facts(product).get("slots", {})}
        else:
            prompts_of = dict(settings.prompts)
            tokenizer = cls._tokenizer(settings, samples, list(prompts_of.values()))
            tokenizer.save(folder)
            config = {"model_cfg": settings.architecture(tokenizer.vocab_size), "preprocess_cfg": {}}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        write_facts(folder, family=cls.name, slots=prompts_of)

    @staticmethod
    def _tokenizer(settings: CaptionerSettings, samples: Samples, prompts_: list[str]) -> Tokenizer:
        """Return the given vocabulary, else one trained on the captions, else CLIP's."""
        text = settings.text
        if text.tokenizer is not None:
            if not (Path(text.tokenizer) / BPE_FILE).is_file():
                problem = f"{text.tokenizer} has no {BPE_FILE}"
                hint = "use a folder written by a captioner's training, or remove it"
                raise RecipeError("train.captioner.text.tokenizer", problem, hint)
            return Tokenizer.load(Path(text.tokenizer))
        if text.vocab_size is None:
            return Tokenizer.clip()
        # Prompts are added to the captions so that they become few tokens.
        return Tokenizer.train([*samples.captions(), *(prompts_ * 100)], text.vocab_size)

    @classmethod
    def untrained(cls, train: TrainConfig) -> torch.nn.Module | None:
        """Return a new CoCa of the settings' shape; None if `train.init` names one."""
        from open_clip.coca_model import CoCa

        if train.init is not None:
            return None
        shape = train.settings.architecture(train.settings.text.vocab_size or _CLIP_VOCABULARY)
        shape.pop("custom_text")
        return CoCa(**shape)

    def __init__(self, train: TrainConfig, assets: Path) -> None:
        self.train: CaptionerSettings = train.settings
        self.assets = assets
        self.config = json.loads((assets / CONFIG_FILE).read_text())
        self.tokenizer = Tokenizer.load(assets) if (assets / BPE_FILE).is_file() else Tokenizer.clip()
        self.prompts = {slot: self.tokenizer.ids(text) for slot, text in read_facts(assets)["slots"].items()}
        architecture = self.config["model_cfg"]
        self.length = int(min(architecture[part]["context_length"] for part in ("text_cfg", "multimodal_cfg")))
        self.preprocessing = preprocess.Preprocessing.of(
            architecture["vision_cfg"]["image_size"], self.config.get("preprocess_cfg", {})
        )
        self.model = Captioner(architecture, self.preprocessing)
        initialize_coca(self.model.coca)
        self.bounds = {"coca.logit_scale": LOGIT_SCALE}
        self.step = Step()
        refuse_batch_norm(train, self.model)

    def start_from(self, product: Path) -> None:
        initialize.load(self.model.coca, product)
        self.model.coca.logit_scale.data.clamp_(*LOGIT_SCALE)

    def prepare(self, samples: Sequence[Sample]) -> Batch:
        """Return images uint8 [B, H, W, 3], tokens [B, L] padded with PAD, labels [B, L − 1] of tokens 1 to L − 1."""
        tokens = torch.full((len(samples), self.length), PAD)
        labels = torch.full((len(samples), self.length - 1), IGNORED)
        for row, sample in enumerate(samples):
            prompt = self._prompt(sample.slot)
            # A truncated caption gets no end token: the model must not learn to end in mid-sentence.
            line = [self.tokenizer.start, *prompt, *self.tokenizer.ids(sample.text), self.tokenizer.end][: self.length]
            tokens[row, : len(line)] = torch.tensor(line)
            labels[row, len(prompt) : len(line) - 1] = tokens[row, 1 + len(prompt) : len(line)]
        images = np.stack([preprocess.read(sample.jpeg, self.preprocessing) for sample in samples])
        return {"pictures": torch.from_numpy(images), "tokens": tokens, "labels": labels}

    def _prompt(self, slot: str) -> list[int]:
        if slot == ORIGINAL:
            return []
        if slot not in self.prompts:
            hint = f"set train.captioner.prompts.{slot}, or remove the slot from train.data.blend"
            raise RecipeError("train.captioner.prompts", f"has no prompt for the slot {slot!r}", hint)
        return self.prompts[slot]

    def begin_step(self, model: torch.nn.Module, parts: Sequence[Batch], step: Step) -> None:
        """Add to each part its tokens' weight and, with several parts, the contrastive gradient by its features."""
        self.step = step
        tokens = step.total(torch.stack([(part["labels"] != IGNORED).sum() for part in parts]).sum().double())
        for part in parts:
            part["tokens_per_part"] = (tokens / step.shares).clamp(min=1 / step.shares).float()
        if not self.train.contrastive or len(parts) == 1:
            return
        features = []
        with torch.no_grad():
            for number, part in enumerate(parts):
                step.reseed(number)
                features.append(model(part["pictures"], part["tokens"], self._length(part), True, decode=False)[:3])
        images, texts, scales = zip(*features, strict=True)
        found = contrast(torch.cat(images), torch.cat(texts), scales[0], step)
        rows = len(images[0])
        for part, image, text in zip(parts, found.image.split(rows), found.text.split(rows), strict=True):
            part |= {"image_gradient": image, "text_gradient": text}
            part |= {"contrastive": found.loss, "scale_gradient": found.scale}

    def loss(self, model: torch.nn.Module, batch: Batch, draw: torch.Generator) -> tuple[torch.Tensor, Metrics]:
        length, contrastive = self._length(batch), self.train.contrastive > 0
        image, text, scale, logits = model(batch["pictures"], batch["tokens"], length, contrastive)
        towers = {"the image encoder": image, "the text encoder": text, "the decoder": logits}
        self.finite = {name: finite([output]) for name, output in towers.items()}
        labels = batch["labels"][:, : length - 1]
        tokens = batch.get("tokens_per_part", learnt_tokens(labels))
        caption = caption_loss(logits, labels, tokens)
        accuracy = (logits.argmax(-1) == labels).sum() / tokens  # no token has the label IGNORED
        metrics = {"caption": caption.detach(), "token_accuracy": accuracy}
        loss = self.train.caption * caption
        if contrastive:
            found = self._contrast(batch, image, text, scale)
            loss = loss + self.train.contrastive * surrogate(found, image, text, scale, self.step)
            metrics["contrastive"] = found.loss
        else:  # DDP waits for every weight's gradient; weight decay of unused projections is harmless
            loss = loss + 0 * (image.sum() + text.sum() + scale.sum())
        return loss, metrics

    def _contrast(self, batch: Batch, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> Contrast:
        """Return the contrastive loss of the whole step: from `begin_step`, or, of a single part, from its features."""
        if "contrastive" not in batch:
            return contrast(image, text, scale, self.step)
        cached = ("contrastive", "image_gradient", "text_gradient", "scale_gradient")
        return Contrast(*(batch[name] for name in cached))

    @staticmethod
    def _length(batch: Batch) -> int:
        """Return the number of tokens of the longest caption."""
        return int((batch["tokens"] != PAD).any(0).sum())

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write a folder for `open_clip.create_model("local-dir:FOLDER")` and the recaption engine `coca`."""
        from safetensors.torch import save_file

        weights = {name: tensor.contiguous() for name, tensor in model.coca.state_dict().items()}
        weights["logit_scale"] = weights["logit_scale"].reshape(())  # as open_clip has it
        save_file(weights, folder / WEIGHTS_FILE)
        if (self.assets / BPE_FILE).is_file():
            self.tokenizer.save(folder)
        shutil.copyfile(self.assets / CONFIG_FILE, folder / CONFIG_FILE)
        write_facts(folder, family=self.name, slots=read_facts(self.assets)["slots"])

    def inspect(self, samples: Samples) -> None:
        """Warn of captions that, with their prompt, are longer than the context."""
        captions = some_captions(samples)
        lengths = [2 + len(self._prompt(slot)) + len(self.tokenizer.ids(text)) for slot, text in captions]
        hint = "raise train.captioner.text.context_length in a new run, or write shorter captions"
        warn_of_cut(self.name, lengths, self.length, hint)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "vocabulary": self.tokenizer.vocab_size, "context": self.length}


def refuse_batch_norm(train: TrainConfig, model: torch.nn.Module) -> None:
    """Raise RecipeError if features of a part depend on the part's other samples, so that no gradient can be cached."""
    if train.accumulate == 1 or not train.settings.contrastive:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            problem = (
                f"is {train.accumulate}, but {name} normalises over a part, and the contrastive loss needs the batch"
            )
            raise RecipeError("train.accumulate", problem, "set accumulate: 1, or train.captioner.contrastive: 0")
