"""One source file's bytes → its clips, or a failure reason: the contract for moving images

What is stored is what a player would show: upright, with square pixels, in BT.709, at a constant rate. A clip is always
encoded again, so it starts with a whole frame. Metadata never reaches a clip.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import simplejpeg

from capstan.pipeline.clips.cuts import SMALL, SceneDetector, at_constant_rate
from capstan.pipeline.config.cut import Cut
from capstan.pipeline.image.decode import Failure
from capstan.pipeline.media import codec
from capstan.pipeline.media.codec import Scaler, VideoWriter
from capstan.pipeline.media.reader import Media, MediaFacts
from capstan.pipeline.media.sniff import UnreadableMedia
from capstan.pipeline.media.spectrogram import spectrogram

_SILENT_RATE: Final = 8000  # samples per second of the silence of a video without sound


@dataclass
class Clip:
    """A clip: `frames` frames from frame `start` on (at cut.fps), its middle frame as JPEG, and its sound as FLAC.

    `sample_rate` and `channels` are 0 if the source has no sound.

    Of sound alone, `mp4` is empty, the frames are counted all the same, and the JPEG is a spectrogram.
    """

    start: int
    frames: int
    width: int
    height: int
    jpg: bytes
    mp4: bytes = b""
    flac: bytes = b""
    sample_rate: int = 0
    channels: int = 0


@dataclass
class CutFile:
    """A source file and its clips, in order; none if no piece is long enough."""

    sha256: str
    bytes: int
    facts: MediaFacts
    clips: list[Clip] = field(default_factory=list)


def cut_file(data: bytes, cut: Cut, quality: int) -> CutFile | Failure:
    """Cut a source file as the recipe's section says; `quality` is of the JPEGs. Return its clips, or why not."""
    try:
        with Media(data, cut) as source:
            _check_streams(source, cut)
            source.check()
            clips = _sounds(source, cut, quality) if cut.sound == "only" else _clips(source, cut, quality)
            if cut.sound == "keep" and clips:
                _add_sound(source, clips, cut)
            facts = source.facts
    except UnreadableMedia as error:
        return Failure(error.reason, error.detail)
    if not clips:
        length = f"{facts.seconds:.1f} s" if facts.seconds else "its length is unknown"
        return Failure("no_clip", f"no piece of at least {cut.seconds[0]:g} s ({length})")
    return CutFile(hashlib.sha256(data).hexdigest(), len(data), facts, clips)


def _check_streams(source: Media, cut: Cut) -> None:
    if cut.sound == "only" and not source.has_sound:
        raise UnreadableMedia("no_sound", "it has no sound, and cut.sound is only")
    if cut.sound != "only" and not source.has_video:
        raise UnreadableMedia("no_video", "it has no video; cut.sound: only makes clips of sound")


def stored_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the size of the clips of a video: shorter side at most `size`, both sides even, never enlarged.

    >>> stored_size(1920, 1080, 256), stored_size(100, 75, 256)
    ((454, 256), (100, 74))
    """
    scale = min(1.0, size / min(width, height))
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _clips(source: Media, cut: Cut, quality: int) -> list[Clip]:
    shortest, longest = (round(seconds * cut.fps) for seconds in cut.seconds)
    limit = round(cut.max_seconds * cut.fps)
    detector = SceneDetector(cut.threshold) if cut.by == "scenes" else None
    clips, open_ = list[Clip](), _Open(cut, quality)
    try:
        for number, (frame, scaler) in enumerate(_scaled(source, cut)):
            if number >= limit:
                raise UnreadableMedia("too_long", f"more than {cut.max_seconds:g} s; see cut.max_seconds")
            new = detector is not None and detector.starts_scene(scaler.small(frame, SMALL))
            if open_.frames and (new or open_.frames == longest):
                if cut.by == "none":
                    raise UnreadableMedia("too_long", f"more than {cut.seconds[1]:g} s, and cut.by is none")
                clips += open_.take(shortest)
            open_.add(frame, number)
        clips += open_.take(shortest)
    finally:
        open_.close()
    return clips


def _scaled(source: Media, cut: Cut) -> Iterator[tuple[Any, Scaler]]:
    """Yield the source's frames at the clips' rate and size; a frame that is shown for longer is scaled once."""
    shown, made, scaler = None, None, None
    ratio = source.facts.width / max(1, source.pixel_width)
    for frame in at_constant_rate(source.frames(), cut.fps):
        if scaler is None:
            width, height = round(frame.width * ratio), frame.height
            upright = (height, width) if round(frame.rotation / 90) % 2 else (width, height)
            scaler = Scaler(*stored_size(*upright, cut.size), codec.pixel_format_of(cut))
        if frame is not shown:
            shown, made = frame, scaler.scaled(frame)
        yield made, scaler


class _Open:
    """The clip that is being encoded."""

    def __init__(self, cut: Cut, quality: int) -> None:
        self._cut, self._quality = cut, quality
        self._writer: VideoWriter | None = None
        self._start, self._size = 0, (0, 0)

    @property
    def frames(self) -> int:
        return self._writer.frames if self._writer is not None else 0

    def add(self, frame: Any, number: int) -> None:
        """Add a frame; it is the first one of a clip if none is open."""
        if self._writer is None:
            self._start, self._size = number, (frame.width, frame.height)
            self._writer = VideoWriter(*self._size, self._cut.fps, self._cut)
        self._writer.add(frame)

    def take(self, shortest: int) -> list[Clip]:
        """End the clip; return it, or nothing if it is shorter than `shortest` frames."""
        writer, clip = self._writer, list[Clip]()
        if writer is not None and writer.frames >= shortest:
            mp4 = writer.finish()
            (still,) = codec.decode_frames(mp4, [(writer.frames - 1) // 2])
            clip = [Clip(self._start, writer.frames, *self._size, jpeg(still, self._quality), mp4)]
        self.close()
        return clip

    def close(self) -> None:
        """Free the encoder."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Return RGB pixels as a JPEG without subsampled colours."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


# Sound ----------------------------------------------------------------------------------------------------------------


def _add_sound(source: Media, clips: list[Clip], cut: Cut) -> None:
    """Add to each clip the sound of its time; what the source lacks is silent.

    A source without sound has silence too: Hugging Face's reader wants the same files in all samples.
    """
    if not source.has_sound:
        rate = cut.sample_rate or _SILENT_RATE
        for clip in clips:
            clip.flac = codec.encode_flac(np.zeros((round(clip.frames * rate / cut.fps), 1), np.int16), rate)
        return
    rate, channels = source.sound_format
    spans = [(round(c.start * rate / cut.fps), round((c.start + c.frames) * rate / cut.fps)) for c in clips]
    first = source.rewind()
    pieces = _pieces(source.sound(from_first_frame=first), spans, channels)
    for clip, samples in zip(clips, pieces, strict=True):
        clip.flac, clip.sample_rate, clip.channels = codec.encode_flac(samples, rate), rate, channels


def _pieces(blocks: Iterator[np.ndarray], spans: list[tuple[int, int]], channels: int) -> Iterator[np.ndarray]:
    """Yield the samples of each span (ascending, apart), holding no more than one span at a time."""
    block, at = np.zeros((0, channels), np.int16), 0  # `block` starts at sample `at`
    for start, stop in spans:
        piece = np.zeros((stop - start, channels), np.int16)
        while at < stop:
            a, b = max(start, at), min(stop, at + len(block))
            if a < b:
                piece[a - start : b - start] = block[a - at : b - at]
            if at + len(block) >= stop:
                break
            at += len(block)
            block = next(blocks, block[:0])
            if not len(block):
                break
        yield piece


def _sounds(source: Media, cut: Cut, quality: int) -> list[Clip]:
    """Return clips of sound alone: every longest length, and the rest if it is not too short."""
    rate, channels = source.sound_format
    shortest, longest = (round(seconds * cut.fps) for seconds in cut.seconds)
    clips, held, count, start = list[Clip](), list[np.ndarray](), 0, 0
    most = round(longest * rate / cut.fps)

    def take(samples: np.ndarray) -> None:
        nonlocal start
        frames = round(len(samples) * cut.fps / rate)
        if frames >= shortest:
            picture = spectrogram(samples, rate)
            height, width = picture.shape[:2]
            flac = codec.encode_flac(samples, rate)
            clips.append(Clip(start, frames, width, height, jpeg(picture, quality), b"", flac, rate, channels))
        start += frames

    for block in source.sound():
        held.append(block)
        count += len(block)
        while count >= most:
            if cut.by == "none" and count > most:
                raise UnreadableMedia("too_long", f"more than {cut.seconds[1]:g} s, and cut.by is none")
            if cut.by == "none":
                break
            samples = np.concatenate(held)
            take(samples[:most])
            held, count = [samples[most:]], count - most
    if count:
        take(np.concatenate(held))
    return clips
