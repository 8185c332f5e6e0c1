"""The recipe's section `score`: scorers and their settings"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from capstan.pipeline.config.section import Section, without_unset


class ClipScore(Section):
    """`clip_score`: cosine similarity of image and caption in an open_clip model."""

    model: str = "ViT-B-32"  # an open_clip name, or a folder with open_clip_config.json and its weights
    pretrained: str | None = None  # a checkpoint file, or one of open_clip's tags; null: the folder's own weights
    embeddings: bool = False  # keep the images' embeddings, float16
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch: Annotated[int, Field(ge=16, multiple_of=16)] = 64  # images per forward pass


class HeadScore(Section):
    """A small head over CLIP's image embeddings: linear layers from a file."""

    weights: str  # .pth or .safetensors
    activation: Literal["none", "relu", "gelu"] | None = None  # between layers; null: the usual one of this score
    output: Literal["linear", "sigmoid"] | None = None  # for one value; two values are always a softmax
    normalize: bool = True  # embeddings of length 1, as LAION's heads were trained on
    model: str | None = None  # the CLIP that the head was trained on; null: the one of score.clip
    pretrained: str | None = None


class NsfwScore(HeadScore):
    """`nsfw_score`: Yahoo's open_nsfw, which is in a package, or a head over CLIP's image embeddings from a file."""

    weights: str | None = None  # type: ignore[assignment]  # a head: .pth or .safetensors; null: open_nsfw

    @model_validator(mode="after")
    def _settings_of_a_head(self) -> NsfwScore:
        stated = [key for key in ("activation", "output", "model", "pretrained") if getattr(self, key) is not None]
        if self.weights is None and stated:
            raise ValueError(f"{stated[0]} is of a head over CLIP embeddings; name the head's file in weights")
        return self


class TextInImage(Section):
    """Text that PP-OCR reads in the image: the share of its area, and the words."""

    confidence: Annotated[float, Field(gt=0, le=1)] = 0.7  # lines read with less do not count
    letters: Annotated[int, Field(ge=1)] = 3  # lines with fewer do not count


class CaptionScore(Section):
    """Measures of the caption: length, words, script, repetition, boilerplate; URLs and file names in it."""

    boilerplate: list[str] = Field(default=[])  # more boilerplate phrases, case-insensitive


class LanguageScore(Section):
    """`language` and `language_score` from a fastText model."""

    weights: str | None = None  # lid.176.bin or another fastText model; null: lid.176.ftz, which is in the package


class ImageScore(Section):
    """Measures of the image: sharpness, flatness, JPEG quality, entropy, border."""


class Score(Section):
    """Scorers; each adds columns to the ledger."""

    clip: ClipScore | None = None
    aesthetic: HeadScore | None = None
    nsfw: NsfwScore | None = None
    watermark: HeadScore | None = None
    caption: CaptionScore | None = None
    language: LanguageScore | None = None
    image: ImageScore | None = None
    text_in_image: TextInImage | None = None

    @model_serializer(mode="wrap")
    def _without_text_in_image(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `text_in_image`, so that recipes of earlier versions keep their hash."""
        return without_unset(dump(self), "text_in_image")
