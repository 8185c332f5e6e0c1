"""Captions → token ids → text states: the encoders of a diffusers pipeline, frozen or trained.

    texts ──ids──▶ {ids, ids_2, …, text_mask} ──encode──▶ {text_states, text_states_2, …, text_pooled, …, text_mask}

A pipeline has slots, `text_encoder`, `text_encoder_2`, … , and takes of each what its slot says here, so that training
sees what the pipeline will. Calling `TextEncoders` goes all the way at once; what comes out depends on nothing but the
texts and the encoders, which its `identity` names: it may be stored, and put into a batch in place of ids.

Shapes: ids and text_mask [B, L], text_states [B, L, W], text_pooled [B, P]; L, W and P are each encoder's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.config import EncoderSettings, TextSettings
from capstan.training.models.diffusion.load_text_encoder import Kind, load_text_encoder

Texts = dict[str, torch.Tensor]  # ids or states, by the names above
_FIELD = "train.diffusion.text.pretrained"


@dataclass(frozen=True)
class Slot:
    """A place for a text encoder in a diffusers pipeline, and what the pipeline makes of it."""

    name: str  # text_encoder, text_encoder_2, …
    kind: Kind = "clip"
    layer: Literal["last", "penultimate"] = "last"  # whose states the model sees
    projected: bool = False  # a CLIPTextModelWithProjection, whose projected end-of-text state is seen too
    masked: bool = False  # padding is masked
    lower: bool = False  # texts are stripped, and put in lower case
    length: int | None = None  # tokens that texts are padded and cut to; null: what the tokenizer says
    required: bool = True  # a small CLIP of one's own stands here where none is given

    @property
    def suffix(self) -> str:
        return self.name.removeprefix("text_encoder")

    @property
    def tokenizer(self) -> str:
        """The name of its tokenizer in the pipeline."""
        return f"tokenizer{self.suffix}"

    @property
    def ids(self) -> str:
        return f"ids{self.suffix}"

    @property
    def states(self) -> str:
        return f"text_states{self.suffix}"

    @property
    def pooled(self) -> str:
        return f"text_pooled{self.suffix}"

    @property
    def mask(self) -> str:
        return f"text_mask{self.suffix}"


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder in its slot, with its tokenizer."""

    slot: Slot
    encoder: Any
    tokenizer: Any

    def ids(self, texts: Sequence[str]) -> Texts:
        """int64 [B, L], exactly as the pipeline will tokenize prompts."""
        length = self.slot.length or self.tokenizer.model_max_length
        given = [text.lower().strip() for text in texts] if self.slot.lower else list(texts)
        tokens = self.tokenizer(given, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {self.slot.ids: tokens.input_ids} | ({self.slot.mask: tokens.attention_mask} if self.slot.masked else {})

    @property
    def width(self) -> int:
        """Of its states."""
        return int(self.encoder.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        """Of its projected state; 0 where the slot takes none."""
        return int(self.encoder.config.projection_dim) if self.slot.projected else 0


def states_of(slot: Slot, encoder: Any, ids: Mapping[str, torch.Tensor]) -> Texts:
    """What the pipeline shows the model of `encoder` for these ids."""
    mask = ids.get(slot.mask)
    if slot.layer == "last":
        out: Texts = {slot.states: encoder(ids[slot.ids], attention_mask=mask)[0]}
    else:
        made = encoder(ids[slot.ids], attention_mask=mask, output_hidden_states=True)
        out = {slot.states: made.hidden_states[-2]}
        if slot.projected:
            out[slot.pooled] = made[0]
    return out if mask is None else out | {slot.mask: mask}


class TextEncoders:
    """The encoders of one model, in the order of its pipeline's slots; `own`: small ones that are trained with it."""

    def __init__(self, towers: Sequence[TextEncoder], *, own: bool) -> None:
        self.towers, self.own = tuple(towers), own
        lengths = {tower.tokenizer.model_max_length for tower in towers if tower.slot.kind == "clip"}
        if len(lengths) > 1:
            problem = f"its CLIPs take texts of different lengths ({', '.join(map(str, sorted(lengths)))} tokens)"
            raise RecipeError(_FIELD, problem, "name encoders of one length")

    @property
    def modules(self) -> list[nn.Module]:
        return [tower.encoder for tower in self.towers]

    def ids(self, texts: Sequence[str]) -> Texts:
        """What `states` takes."""
        return {name: ids for tower in self.towers for name, ids in tower.ids(texts).items()}

    def states(self, ids: Mapping[str, torch.Tensor]) -> Texts:
        """What frozen encoders give for `ids`, on their device."""
        with torch.no_grad():
            every = [states_of(tower.slot, tower.encoder, ids) for tower in self.towers]
        return {name: tensor for states in every for name, tensor in states.items()}

    def __call__(self, texts: Sequence[str]) -> Texts:
        """Texts → states, on the encoders' device: what may be stored, and put into a batch in place of ids."""
        device = next(self.towers[0].encoder.parameters()).device
        return self.states({name: ids.to(device) for name, ids in self.ids(texts).items()})

    def to(self, device: torch.device) -> TextEncoders:
        """Move the encoders to `device`, in evaluation mode."""
        for module in self.modules:
            module.to(device).eval().requires_grad_(False)
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that can change a state, as plain data."""
        return {tower.slot.name: _identity(tower) for tower in self.towers}


def _identity(tower: TextEncoder) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name, weight in sorted(tower.encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(weight.cpu().float().numpy()).tobytes())
    # transformers' tokenizers are this one file, whatever they were read from; calls leave their padding in it.
    words = json.loads(tower.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    slot, length = tower.slot, tower.slot.length or tower.tokenizer.model_max_length
    taken = {"layer": slot.layer, "projected": slot.projected, "masked": slot.masked, "lower": slot.lower}
    special = tower.tokenizer.special_tokens_map
    return {"weights": weights.hexdigest(), "words": fingerprint(words), "special": special, "length": length, **taken}


def open_encoders(slots: Sequence[Slot], settings: TextSettings) -> TextEncoders:
    """The frozen encoders that `text.pretrained` names, each in its slot. Raises RecipeError where they do not fit."""
    chosen = _assigned(slots, settings)
    towers = [
        TextEncoder(slot, *load_text_encoder(one, slot.name, slot.kind, slot.projected, _FIELD)) for slot, one in chosen
    ]
    return TextEncoders(towers, own=False)


def _assigned(slots: Sequence[Slot], settings: TextSettings) -> list[tuple[Slot, EncoderSettings]]:
    named = settings.encoders
    required = [slot for slot in slots if slot.required]
    if isinstance(settings.pretrained, str) and len(slots) > 1:  # a whole pipeline: those that it has
        folder = Path(settings.pretrained)
        folder = folder / "product" if (folder / "product").is_dir() else folder
        found = [slot for slot in slots if (folder / slot.name).is_dir()]
        named = tuple(EncoderSettings(model=str(folder)) for _ in found) or named
        if found and {slot.name for slot in required} <= {slot.name for slot in found}:
            return list(zip(found, named, strict=True))
    for taken in (required, list(slots)):
        if len(taken) == len(named):
            return list(zip(taken, named, strict=True))
    wanted = ", ".join(f"{slot.kind}{'' if slot.required else ' (or none)'}" for slot in slots)
    problem = f"names {len(named)} text encoder{'s' * (len(named) != 1)}; this network's pipeline has {wanted}"
    raise RecipeError(_FIELD, problem, "name one for each, as a list")


def new_encoders(slots: Sequence[Slot], settings: TextSettings, tokenizer: Path) -> TextEncoders:
    """New small CLIPs, drawn from torch's global generator, in every slot that must be filled."""
    places = [slot for slot in slots if slot.required]
    return TextEncoders([_new_tower(slot, settings, tokenizer) for slot in places], own=True)


def _new_tower(slot: Slot, settings: TextSettings, folder: Path) -> TextEncoder:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=slot.length or settings.length)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return TextEncoder(slot, new_encoder(slot, settings, len(tokenizer), **special), tokenizer)


def new_encoder(slot: Slot, settings: TextSettings, vocabulary: int, **special: int) -> Any:
    """A new CLIPTextModel (WithProjection, where the slot is) for so many ids; `special` are its tokenizer's."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=4 * settings.width,
        projection_dim=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=slot.length or settings.length,
        **special,
    )
    return (CLIPTextModelWithProjection if slot.projected else CLIPTextModel)(config)
