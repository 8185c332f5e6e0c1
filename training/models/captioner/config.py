"""The recipe's section `train.captioner`: towers, losses, prompts"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.recaption import prompts
from capstan.training.config import ORIGINAL
from capstan.training.config.families import FamilySettings

Positive = Annotated[int, Field(ge=1)]


class Vision(Section):
    """The vision tower: a ViT over square images."""

    image_size: Positive = 224
    """Side of the square images in pixels."""
    patch_size: Positive = 32
    """Side of a patch in pixels; divides image_size."""
    width: Positive = 768
    """Width of the layers; a multiple of head_width."""
    head_width: Positive = 64
    """Width of each attention head."""
    layers: Positive = 12
    """Number of layers."""
    queries: Annotated[int, Field(ge=0)] = 256
    """Queries of the attentional pooler, which the decoder sees; 0: it sees all patches."""


class Text(Section):
    """The text tower and, with the same width and heads, the decoder."""

    context_length: Annotated[int, Field(ge=4)] = 128
    """Longest caption in tokens, with start, prompt and end."""
    vocab_size: Positive | None = None
    """Size of a vocabulary trained on the captions; null: CLIP's own vocabulary."""
    tokenizer: str | None = None
    """Folder with a vocabulary, instead of vocab_size; null: none."""
    width: Positive = 512
    """Width of text tower and decoder; a multiple of heads."""
    heads: Positive = 8
    """Attention heads per layer."""
    layers: Positive = 12
    """Number of layers of the text tower."""
    decoder_layers: Positive = 12
    """Number of layers of the decoder."""


class CaptionerSettings(FamilySettings):
    """`train.captioner`. Defaults: coca_ViT-B-32 with a longer context for long captions."""

    vision: Vision = Vision()
    """The vision tower."""
    text: Text = Text()
    """The text tower and the decoder."""
    contrastive: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the contrastive loss; 0: off."""
    caption: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the captioning loss; 0: off."""
    prompts: dict[str, str] = Field(default=dict(prompts.PREFIXES))
    """Slot → the prompt that precedes its captions."""

    @model_validator(mode="after")
    def _fits(self) -> CaptionerSettings:
        vision, text = self.vision, self.text
        if vision.image_size % vision.patch_size:
            raise ValueError(f"vision.image_size {vision.image_size} does not divide by patch_size {vision.patch_size}")
        if vision.width % vision.head_width or text.width % text.heads:
            raise ValueError("width does not divide by head_width (vision) or by heads (text)")
        if not vision.queries and (vision.width != text.width or vision.width % 4):
            raise ValueError("without queries, vision.width must be text.width, a multiple of 4")
        if self.text.vocab_size is not None and self.text.tokenizer is not None:
            raise ValueError("text.vocab_size and text.tokenizer exclude each other; remove one")
        if ORIGINAL in self.prompts or len(set(self.prompts.values())) < len(self.prompts):
            raise ValueError(f"prompts must differ between slots; {ORIGINAL} has none")
        if not self.contrastive and not self.caption:
            raise ValueError("contrastive and caption are both 0; set one of them above 0")
        return self

    def architecture(self, vocab_size: int) -> dict[str, Any]:
        """Return the architecture in open_clip's format (`model_cfg`)."""
        text = {key: getattr(self.text, key) for key in ("context_length", "width", "heads")}
        text["vocab_size"] = vocab_size
        pooler: dict[str, Any] = {"attentional_pool": False}
        if self.vision.queries:
            pooler = {
                "attentional_pool": True,
                "attn_pooler_queries": self.vision.queries + 1,
            }  # the first one is the pooled feature
            pooler["attn_pooler_heads"] = self.text.heads
        return {
            "embed_dim": self.text.width,
            "vision_cfg": {**self.vision.model_dump(exclude={"queries"}), **pooler, "output_tokens": True},
            "text_cfg": {**text, "layers": self.text.layers, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**text, "layers": self.text.decoder_layers},
            "custom_text": True,
        }
