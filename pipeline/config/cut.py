"""The recipe's section `cut`: source videos → clips of one length, size and frame rate"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config.section import Section


class Cut(Section):
    """How `capstan cut` turns each source video into clips. Clips are always encoded again."""

    by: Literal["scenes", "stride", "none"] = "scenes"
    """Where clips end: at changes of scene and after the longest length, after the longest length only, or nowhere."""
    seconds: Annotated[tuple[float, float], Field(examples=[[2, 8]])] = (2.0, 8.0)
    """Shortest and longest length of a clip in seconds; shorter pieces are dropped."""
    fps: Annotated[int, Field(ge=1, le=120)] = 16
    """Frames per second of the clips; source frames are repeated or left out by their time stamps."""
    size: Annotated[int, Field(ge=16, le=4096)] = 256
    """Shorter side of the clips in pixels; videos are never enlarged."""
    sound: Literal["keep", "drop", "only"] = "keep"
    """Whether a clip's sound is kept next to it as FLAC; only: clips of sound alone, with a spectrogram as image."""
    sample_rate: Annotated[int, Field(ge=4000, le=48_000)] | None = None
    """Samples per second of the sound; null: the source's, at most 48,000."""
    chroma: Literal["420", "444"] = "420"
    """Resolution of the colours: halved in both directions (420), or full (444), which not every player shows."""
    crf: Annotated[int, Field(ge=0, le=51)] = 18
    """Quality of H.264: 0 loses nothing, 18 hardly anything that is seen, 51 is the worst."""
    threshold: Annotated[float, Field(gt=0, le=255)] = 27.0
    """Difference of two frames (mean over hue, saturation and value, 0 to 255) from which on a new scene starts."""
    videos: Annotated[int, Field(ge=1)] = 16
    """Source videos per unit; the clips of a unit are one shard."""
    min_size: Annotated[int, Field(ge=1)] = 64
    """Smallest shorter side of a source video in pixels; smaller ones fail as `too_small`."""
    max_bytes: Annotated[int, Field(ge=1)] = 200_000_000
    """Largest source file in bytes, in place of fetch.max_bytes."""
    max_pixels: Annotated[int, Field(ge=1)] = 10_000_000
    """Largest number of pixels of a source frame; larger ones fail as `too_many_pixels` before they are decoded."""
    max_seconds: Annotated[float, Field(gt=0)] = 1200.0
    """Longest source video in seconds; longer ones fail as `too_long`."""
    max_frames: Annotated[int, Field(ge=1)] = 100_000
    """Largest number of frames of a source video; those with more fail as `too_long`."""

    @model_validator(mode="after")
    def _lengths_are_ordered(self) -> Cut:
        shortest, longest = self.seconds
        if not 0 < shortest <= longest:
            raise ValueError("seconds must be [shortest, longest], both above 0 and in this order")
        if round(shortest * self.fps) < 1:
            raise ValueError("seconds and fps allow clips without a frame; raise one of them")
        return self
