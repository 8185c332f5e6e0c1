"""A sample → what an engine sees of it: its image, or frames of its clip, as one sheet or as a list"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from capstan.pipeline import extras
from capstan.pipeline.dataset.parts import parts_in
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import Frames, RecaptionConfig
from capstan.recaption.engines import CaptionEngine, EngineInput
from capstan.recaption.planning.contents import Reads
from capstan.recaption.preprocess import QUALITY

VERSION: Final = 1  # of sheets and of the choice of frames; part of a layer's id


class View:
    """How an engine sees samples: `frames` None: their images alone."""

    def __init__(self, engine: CaptionEngine, frames: Frames | None) -> None:
        self.engine, self.frames = engine, frames

    @property
    def reads(self) -> Reads:
        return Reads(self.engine.uses_original, self.frames is not None)

    def describe(self) -> dict[str, Any]:
        """Return everything that can change a caption, as plain data."""
        if self.frames is None:
            return self.engine.describe()
        return self.engine.describe() | {"frames": {"version": VERSION, **self.frames.model_dump()}}

    def samples(
        self, dataset: Dataset, shard: str, rows: Sequence[int]
    ) -> Iterator[tuple[str, bytes, Mapping[str, bytes]]]:
        """Yield (key, JPEG, parts by suffix) of rows of a shard; images alone have no parts."""
        yield from dataset.read_samples(shard, rows, parts=self.frames is not None)

    def prepare(self, jpeg: bytes, parts: Mapping[str, bytes]) -> EngineInput:
        """Return what the engine's `caption` needs of a sample; one without a clip is an image.

        Raises Exception for a broken image or clip.
        """
        if self.frames is None or "mp4" not in parts:
            return self.engine.prepare(jpeg)
        shown = frames_of(parts["mp4"], self.frames.count)
        if self.frames.show == "sheet":
            return self.engine.prepare(_encoded(_sheet(shown, self.frames.across)))
        return tuple(self.engine.prepare(_encoded(frame)) for frame in shown)  # type: ignore[misc]


def frames_of(mp4: bytes, count: int) -> list[np.ndarray]:
    """Return up to `count` frames of a clip, evenly spread from its first to its last one: RGB uint8 [H, W, 3]."""
    from capstan.pipeline.media.codec import decode_frames

    def spread(frames: int, rate: float) -> list[int]:
        return sorted({round((frames - 1) * number / (count - 1)) for number in range(count)})

    return decode_frames(mp4, spread)


def _sheet(frames: Sequence[np.ndarray], across: int) -> np.ndarray:
    from capstan.pipeline.media.strip import sheet_of

    return sheet_of(frames, across)


def _encoded(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def check_clips(dataset: Dataset, config: RecaptionConfig) -> None:
    """Raise RecipeError if frames are wanted and the dataset has no clips, and MissingExtra without a decoder."""
    if config.frames is None:
        return
    extras.require(extras.VIDEO, "recaption")
    shards = dataset.shard_names
    if shards and "mp4" not in parts_in(dataset.table(shards[0]).column_names):
        hint = "build it with source.parts: [mp4], or remove frames"
        raise RecipeError("recaption.frames", "the dataset has no clips", hint)
