"""The recipe's section `score`: scorers and their settings"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from capstan.pipeline.config.section import Section, without_unset


class ClipScore(Section):
    """`clip_score`: cosine similarity of image and caption in an open_clip model."""

    model: str = "ViT-B-32"
    """An open_clip name, or a folder with open_clip_config.json and its weights."""
    pretrained: str | None = None
    """A checkpoint file, or one of open_clip's tags; null: the folder's own weights."""
    embeddings: bool = False
    """Whether to keep the images' embeddings, as float16."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the computation; fp16 needs a GPU."""
    batch: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    """Number of images per forward pass."""


class HeadScore(Section):
    """A small head over CLIP's image embeddings: linear layers from a file."""

    weights: str = Field(examples=["head.pth"])
    """File of the head: .pth or .safetensors."""
    activation: Literal["none", "relu", "gelu"] | None = None
    """Activation between the head's layers; null: the usual one of this score."""
    output: Literal["linear", "sigmoid"] | None = None
    """Output of a head with one value; null: the usual one of this score. Two values are always a softmax."""
    normalize: bool = True
    """Whether embeddings have length 1, as for LAION's heads."""
    model: str | None = None
    """The CLIP that the head was trained on: an open_clip name or a folder; null: the one of score.clip."""
    pretrained: str | None = None
    """Checkpoint file or open_clip tag of `model`; null: the folder's own weights."""


class NsfwScore(HeadScore):
    """`nsfw_score`: Yahoo's open_nsfw, which is in a package, or a head over CLIP's image embeddings from a file."""

    weights: str | None = None  # type: ignore[assignment]
    """File of a head over CLIP (.pth or .safetensors); null: open_nsfw, which needs no CLIP."""

    @model_validator(mode="after")
    def _settings_of_a_head(self) -> NsfwScore:
        stated = [key for key in ("activation", "output", "model", "pretrained") if getattr(self, key) is not None]
        if self.weights is None and stated:
            raise ValueError(f"{stated[0]} is of a head over CLIP embeddings; name the head's file in weights")
        return self


class TextInImage(Section):
    """Text that PP-OCR reads in the image: the share of its area, and the words."""

    confidence: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Smallest confidence of a line that counts, 0 to 1."""
    letters: Annotated[int, Field(ge=1)] = 3
    """Smallest number of letters of a line that counts."""


class CaptionScore(Section):
    """Measures of the caption: length, words, script, repetition, boilerplate; URLs and file names in it."""

    boilerplate: list[str] = Field(default=[])
    """More boilerplate phrases to look for, case-insensitive."""


class LanguageScore(Section):
    """`language` and `language_score` from a fastText model."""

    weights: str | None = None
    """A fastText model such as lid.176.bin; null: lid.176.ftz, which is in the package."""


class ImageScore(Section):
    """Measures of the image: sharpness, flatness, JPEG quality, entropy, border."""


class VideoScore(Section):
    """Measures of a clip's video: motion, static frames, black bars."""


class SoundScore(Section):
    """Measures of a clip's sound: loudness, silence, clipping."""


class Score(Section):
    """Scorers; each adds columns to the ledger."""

    clip: ClipScore | None = None
    """Measures how well caption and image fit, by a CLIP; null: off."""
    aesthetic: HeadScore | None = None
    """Measures how pleasing the image is, by a head over CLIP; null: off."""
    nsfw: NsfwScore | None = None
    """Measures how likely the image is not safe for work; null: off."""
    watermark: HeadScore | None = None
    """Measures how likely a watermark is, by a head over CLIP; null: off."""
    caption: CaptionScore | None = None
    """Measures length, words, script and repetition of the caption; null: off."""
    language: LanguageScore | None = None
    """Measures the caption's language (extra `language`); null: off."""
    image: ImageScore | None = None
    """Measures sharpness, flatness, JPEG quality, entropy and border of the image; null: off."""
    text_in_image: TextInImage | None = None
    """Measures text in the image (extra `ocr`); null: off."""
    video: VideoScore | None = None
    """Measures motion, static frames and black bars of a clip's KEY.mp4 (extra `video`); null: off."""
    sound: SoundScore | None = None
    """Measures loudness, silence and clipping of a clip's KEY.flac (extra `video`); null: off."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is unset and came later, so that recipes of earlier versions keep their hash."""
        return without_unset(dump(self), "text_in_image", "video", "sound")
