"""The recipe's `score` section (and `dedup.copies`) → scorers, in a fixed order.

To add a scorer, write its class in a file of this folder and list it here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pyarrow as pa

from capstan.pipeline import extras
from capstan.pipeline.config import ClipScore, HeadScore, Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.gpus import check_gpus, check_precision
from capstan.pipeline.score.caption import CaptionMeasures
from capstan.pipeline.score.clip_model import FILE_SUFFIXES, ClipModel
from capstan.pipeline.score.clip_score import ClipSimilarity, Embeddings
from capstan.pipeline.score.descriptors import CopyDescriptors
from capstan.pipeline.score.heads import Aesthetic, Head, Nsfw, Watermark
from capstan.pipeline.score.image import ImageMeasures
from capstan.pipeline.score.language import Language
from capstan.pipeline.score.moving import SoundMeasures, VideoMeasures
from capstan.pipeline.score.open_nsfw import OpenNsfw
from capstan.pipeline.score.scorer import Scorer
from capstan.pipeline.score.text_in_image import TextInImage

HEADS: Final[dict[str, type[Head]]] = {"aesthetic": Aesthetic, "nsfw": Nsfw, "watermark": Watermark}
_COLUMNS: Final[dict[str, type[Scorer]]] = {
    "clip": ClipSimilarity,
    **HEADS,
    "caption": CaptionMeasures,
    "language": Language,
    "image": ImageMeasures,
    "text_in_image": TextInImage,
    "video": VideoMeasures,
    "sound": SoundMeasures,
}


def columns(recipe: Recipe) -> dict[str, list[pa.Field]]:
    """Return scorer name → ledger columns, for the recipe's scorers. Needs no weights."""
    return {name: kind.columns for name, kind in _COLUMNS.items() if getattr(recipe.score, name) is not None}


def scorer_of() -> dict[str, str]:
    """Return ledger column → the key below `score` whose scorer measures it, for all scorers."""
    return {field.name: name for name, kind in _COLUMNS.items() for field in kind.columns}


def scorers(recipe: Recipe) -> list[Scorer]:
    """Create the recipe's scorers, pinned. Raises RecipeError if weights are missing or do not fit."""
    score, made = recipe.score, list[Scorer]()
    heads = {name: head for name, head in HEADS.items() if getattr(getattr(score, name), "weights", None) is not None}
    for name in (*(["clip"] if score.clip is not None else []), *heads):
        extras.require(extras.RECAPTION, f"score.{name}")
    if score.clip is not None:
        made.append(ClipSimilarity(_clip_model(score.clip)))
        if score.clip.embeddings:
            made.append(Embeddings(_clip_model(score.clip)))
    for name, head in heads.items():
        config = getattr(score, name)
        made.append(head(config, _clip_model_of_head(name, config, score.clip)))
    if score.nsfw is not None and score.nsfw.weights is None:
        made.append(OpenNsfw())
    if score.caption is not None:
        made.append(CaptionMeasures(score.caption))
    if score.language is not None:
        made.append(Language(score.language))
    if score.image is not None:
        made.append(ImageMeasures(score.image))
    if score.text_in_image is not None:
        made.append(TextInImage(score.text_in_image))
    for name, measures in (("video", VideoMeasures), ("sound", SoundMeasures)):
        if getattr(score, name) is not None:
            _check_clips(recipe, name, measures.sees_part)
            made.append(measures())
    if recipe.dedup.copies is not None:
        made.append(CopyDescriptors(recipe.dedup.copies))
    for scorer in made:
        assert scorer.id
        if isinstance(scorer, Head):
            scorer.layers()  # report a mistake before anything is fetched
    return made


def _check_clips(recipe: Recipe, name: str, part: str) -> None:
    """Raise RecipeError if the source's parts are not those that a scorer of clips reads."""
    extras.require(extras.VIDEO, f"score.{name}")
    parts = (recipe.source.parts if recipe.source is not None else None) or []
    if recipe.source is not None and part not in parts:
        hint = f"set source.parts to [mp4, flac] (or [{part}]), and build again"
        raise RecipeError(f"score.{name}", f"reads {part} files, which source.parts does not name", hint)


def check_machine(recipe: Recipe) -> None:
    """Raise RecipeError if this machine lacks the GPUs that the recipe's models are to run on."""
    score = recipe.score
    if score.clip is not None:
        check_precision(score.clip.precision, "score.clip.precision", recipe.resources)
    if score.clip is not None or any(getattr(score, name) is not None for name in HEADS):
        check_gpus(recipe.resources)


def from_hub(recipe: Recipe) -> list[str]:
    """Return the sections whose CLIP is named by a tag of open_clip: its weights may have to be downloaded."""
    sections = {f"score.{name}": getattr(recipe.score, name) for name in ("clip", *HEADS)}
    named = {key: section for key, section in sections.items() if section is not None and section.model is not None}
    return [
        f"{key} ({section.model})"
        for key, section in named.items()
        if section.pretrained is not None
        and not section.pretrained.endswith(FILE_SUFFIXES)
        and not Path(section.pretrained).is_file()
        and not Path(section.model).is_dir()
    ]


def _clip_model(clip: ClipScore) -> ClipModel:
    return ClipModel(clip.model, clip.pretrained, clip.precision, "score.clip")


def _clip_model_of_head(name: str, head: HeadScore, clip: ClipScore | None) -> ClipModel:
    if head.model is not None:
        return ClipModel(head.model, head.pretrained, clip.precision if clip else "fp32", f"score.{name}")
    if clip is None:
        problem, hint = (
            "no CLIP provides its embeddings",
            "add score.clip, or set the head's own CLIP in `model` and `pretrained`",
        )
        raise RecipeError(f"score.{name}.model", problem, hint)
    return _clip_model(clip)
