"""Captions → token ids → text states, by frozen or trained encoders.

    texts ──ids──▶ {ids, ids_2, …, text_mask} ──encode──▶ {text_states, text_states_2, …, text_pooled, …, text_mask}

A pipeline has slots, `text_encoder`, `text_encoder_2`, …; `Slot` says which states it uses of each, so that training
sees the same. Calling `TextEncoders` goes from texts to states in one call. States depend only on the texts and on the
encoders (`identity`), so they can be stored, and put into a batch instead of ids.

Shapes: ids and text_mask [B, L], text_states [B, L, W], text_pooled [B, P]; L, W and P differ between encoders.
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
from capstan.training.models.precision import outside_autocast

Texts = dict[str, torch.Tensor]  # ids or states, by the names above


@dataclass(frozen=True)
class Slot:
    """A place for a text encoder in a diffusers pipeline, and what the pipeline uses of it."""

    name: str  # text_encoder, text_encoder_2, …
    kind: Kind = "clip"
    layer: Literal["last", "penultimate"] = "last"  # the layer whose states the model sees
    projected: bool = False  # a CLIPTextModelWithProjection, whose projected end-of-text state is used too
    masked: bool = False  # padding is masked
    lower: bool = False  # texts are stripped and lower-cased
    length: int | None = None  # tokens that texts are padded and truncated to; None: the tokenizer's
    required: bool = True  # trained as a small CLIP if no frozen one is given

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
    chunks: int = 1  # of a CLIP: a text is read in as many pieces of `length` tokens

    def ids(self, texts: Sequence[str]) -> Texts:
        """Return ids, int64 [B, L], exactly as the pipeline tokenizes prompts; with chunks, one after the other."""
        given, length = [self._given(text) for text in texts], self.length
        if self.chunks > 1:
            return {self.slot.ids: torch.tensor([self._chunked(text) for text in given])}
        tokens = self.tokenizer(given, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {self.slot.ids: tokens.input_ids} | ({self.slot.mask: tokens.attention_mask} if self.slot.masked else {})

    def _chunked(self, text: str) -> list[int]:
        """Return the ids of a text in chunks, each with start, end and padding of its own."""
        tokenizer, room = self.tokenizer, self.length - 2
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        chunks: list[int] = []
        for number in range(self.chunks):
            part = ids[number * room : (number + 1) * room]
            padding = [tokenizer.pad_token_id] * (room - len(part))
            chunks += [tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding]
        return chunks

    @property
    def length(self) -> int:
        """The number of tokens that texts, or chunks of them, are padded and truncated to."""
        return int(self.slot.length or self.tokenizer.model_max_length)

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text that is read whole, with one start and one end."""
        return self.chunks * (self.length - 2) + 2 if self.chunks > 1 else self.length

    def tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without truncation."""
        return len(self.tokenizer(self._given(text), truncation=False, padding=False, verbose=False).input_ids)

    def _given(self, text: str) -> str:
        return text.lower().strip() if self.slot.lower else text

    @property
    def width(self) -> int:
        """Width of its states."""
        return int(self.encoder.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        """Width of its projected state; 0 if the slot does not use it."""
        return int(self.encoder.config.projection_dim) if self.slot.projected else 0


def states_of(slot: Slot, encoder: Any, ids: Mapping[str, torch.Tensor]) -> Texts:
    """Return the states of `encoder` for these ids, as the pipeline passes them to the model.

    Chunks are encoded by themselves; their states follow each other, and the first one's projected state is used. So do
    the tools that let Stable Diffusion read long prompts.
    """
    mask = ids.get(slot.mask)
    if slot.kind == "clip" and (count := _chunks(encoder, ids[slot.ids])) > 1:
        rows, width = ids[slot.ids].shape
        states = states_of(slot, encoder, {slot.ids: ids[slot.ids].reshape(rows * count, width // count)})
        joined = {slot.states: states[slot.states].reshape(rows, width, -1)}
        return joined | ({slot.pooled: states[slot.pooled][::count]} if slot.projected else {})
    if slot.layer == "last":
        out: Texts = {slot.states: encoder(ids[slot.ids], attention_mask=mask)[0]}
    else:
        output = encoder(ids[slot.ids], attention_mask=mask, output_hidden_states=True)
        out = {slot.states: output.hidden_states[-2]}
        if slot.projected:
            out[slot.pooled] = output[0]
    return out if mask is None else out | {slot.mask: mask}


def _chunks(encoder: Any, ids: torch.Tensor) -> int:
    """Return the number of chunks in ids [B, L]: an encoder reads no more tokens at once than it has positions."""
    return int(ids.shape[1] // encoder.config.max_position_embeddings)


class TextEncoders:
    """The encoders of one model, in its pipeline's order; `own`: small ones that are trained with it.

    `field` is that of the recipe that names frozen ones, for errors.
    """

    def __init__(self, encoders: Sequence[TextEncoder], *, own: bool, field: str = "") -> None:
        self.encoders, self.own = tuple(encoders), own
        self._nothing: dict[bool, Texts] = {}
        lengths = {one.tokenizer.model_max_length for one in encoders if one.slot.kind == "clip"}
        if len(lengths) > 1:
            problem = f"the CLIPs take texts of different lengths ({', '.join(map(str, sorted(lengths)))} tokens)"
            raise RecipeError(field, problem, "use encoders of the same length")

    @property
    def modules(self) -> list[nn.Module]:
        return [one.encoder for one in self.encoders]

    def ids(self, texts: Sequence[str]) -> Texts:
        """Return the ids that `states` takes."""
        return {name: ids for one in self.encoders for name, ids in one.ids(texts).items()}

    def states(self, ids: Mapping[str, torch.Tensor]) -> Texts:
        """Return the states of frozen encoders for `ids`, on their device, in the precision of their weights."""
        with torch.no_grad(), outside_autocast(next(iter(ids.values())).device):
            every = [states_of(one.slot, one.encoder, ids) for one in self.encoders]
        return {name: tensor for states in every for name, tensor in states.items()}

    def given(self, batch: Mapping[str, torch.Tensor], dropped: torch.Tensor) -> Texts:
        """Return a model's text input: ids if the encoders are trained, else states, with "" in the `dropped` rows.

        A batch has the texts' ids, or their precomputed states.
        """
        precomputed = any(one.slot.states in batch for one in self.encoders)
        nothing = {name: value.to(dropped.device) for name, value in self._of_nothing(states=precomputed).items()}
        texts = _emptied({name: batch[name] for name in nothing}, nothing, dropped)
        return texts if precomputed or self.own else self.states(texts)

    def _of_nothing(self, *, states: bool) -> Texts:
        """Return the ids of an empty caption, or its states; each [1, ...]."""
        if states not in self._nothing:
            self._nothing[states] = self([""]) if states else self.ids([""])
        return self._nothing[states]

    def __call__(self, texts: Sequence[str]) -> Texts:
        """Return the states of texts, on the encoders' device; they can be stored, and replace ids in a batch."""
        device = next(self.encoders[0].encoder.parameters()).device
        return self.states({name: ids.to(device) for name, ids in self.ids(texts).items()})

    def to(self, device: torch.device) -> TextEncoders:
        """Move the encoders to `device`, in evaluation mode."""
        for module in self.modules:
            module.to(device).eval().requires_grad_(False)
        return self

    def identity(self) -> dict[str, Any]:
        """Return everything that can change a state, as plain data."""
        return {one.slot.name: _identity(one) for one in self.encoders}


def _emptied(texts: Texts, nothing: Texts, dropped: torch.Tensor) -> Texts:
    """Return `texts` [B, ...] with `nothing` [1, ...] in the `dropped` rows."""
    return {
        name: torch.where(dropped.view(-1, *[1] * (value.dim() - 1)), nothing[name].to(value.dtype), value)
        for name, value in texts.items()
    }


def _identity(one: TextEncoder) -> dict[str, Any]:
    weights = hashlib.sha256()
    for name, weight in sorted(one.encoder.state_dict().items()):
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(weight.cpu().float().numpy()).tobytes())
    # The whole tokenizer as JSON, whatever files it was read from; calls leave their padding in it.
    words = json.loads(one.tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    slot, length = one.slot, one.slot.length or one.tokenizer.model_max_length
    used = {"layer": slot.layer, "projected": slot.projected, "masked": slot.masked, "lower": slot.lower}
    special = one.tokenizer.special_tokens_map
    more = {"chunks": one.chunks} if one.chunks > 1 else {}
    known = {"weights": weights.hexdigest(), "words": fingerprint(words), "special": special, "length": length}
    return known | used | more


def open_encoders(slots: Sequence[Slot], settings: TextSettings, section: str = "diffusion") -> TextEncoders:
    """Load the frozen encoders of `text.pretrained` into their slots. Raises RecipeError if they do not fit.

    `section` is the recipe's, for errors.
    """
    field = f"train.{section}.text.pretrained"
    chosen = _assigned(slots, settings, field)
    chunks = settings.chunks or 1
    if chunks > 1 and any(slot.kind != "clip" for slot in slots):
        problem = f"is {chunks}, and this network's pipeline has a T5, which reads long texts itself"
        raise RecipeError(f"train.{section}.text.chunks", problem, "remove it")
    encoders = [
        TextEncoder(slot, *load_text_encoder(one, slot.name, slot.kind, slot.projected, field), chunks)
        for slot, one in chosen
    ]
    return TextEncoders(encoders, own=False, field=field)


def _assigned(slots: Sequence[Slot], settings: TextSettings, field: str) -> list[tuple[Slot, EncoderSettings]]:
    named = settings.encoders
    required = [slot for slot in slots if slot.required]
    if isinstance(settings.pretrained, str) and len(slots) > 1:  # a whole pipeline: the encoders that it has
        folder = Path(settings.pretrained)
        folder = folder / "product" if (folder / "product").is_dir() else folder
        present = [slot for slot in slots if (folder / slot.name).is_dir()]
        named = tuple(EncoderSettings(model=str(folder)) for _ in present) or named
        if present and {slot.name for slot in required} <= {slot.name for slot in present}:
            return list(zip(present, named, strict=True))
    for filled in (required, list(slots)):
        if len(filled) == len(named):
            return list(zip(filled, named, strict=True))
    wanted = ", ".join(f"{slot.kind}{'' if slot.required else ' (optional)'}" for slot in slots)
    problem = f"names {len(named)} text encoder{'s' * (len(named) != 1)}; this network's pipeline has {wanted}"
    raise RecipeError(field, problem, "set a list with one for each")


def new_encoders(slots: Sequence[Slot], settings: TextSettings, tokenizer: Path) -> TextEncoders:
    """Return new small CLIPs in every required slot, initialised from torch's global generator."""
    required = [slot for slot in slots if slot.required]
    return TextEncoders([_new_in_slot(slot, settings, tokenizer) for slot in required], own=True)


def unread_encoders(slots: Sequence[Slot], settings: TextSettings) -> list[TextEncoder]:
    """Return new small CLIPs of the largest vocabulary in every required slot; they have no tokenizer, so no text."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # defaults lie outside a small vocabulary
    required = [slot for slot in slots if slot.required]
    return [TextEncoder(slot, new_encoder(slot, settings, settings.vocab_size, **special), None) for slot in required]


def _new_in_slot(slot: Slot, settings: TextSettings, folder: Path) -> TextEncoder:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(
        folder, model_max_length=slot.length or settings.length, trust_remote_code=False
    )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return TextEncoder(slot, new_encoder(slot, settings, len(tokenizer), **special), tokenizer)


def new_encoder(slot: Slot, settings: TextSettings, vocabulary: int, **special: int) -> Any:
    """Return a new CLIPTextModel (or WithProjection) for `vocabulary` ids; `special` are its special ids."""
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
