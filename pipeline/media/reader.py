"""Bytes of a video or sound file of anybody's → decoded frames and samples, or a failure reason, by PyAV (FFmpeg)

Everything that is opened is closed by a context manager, also after an error: PyAV leaks what is left to the collector.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import av
import numpy as np

from capstan.pipeline.config.cut import Cut
from capstan.pipeline.media.sniff import UnreadableMedia, check_whole, container_of

av.logging.set_level(av.logging.PANIC)  # damage is a row's reason, not a line on the terminal

_VIDEO_CODECS: Final = {
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "theora", "ffv1"),
    *("dnxhd", "h263", "vc1", "libdav1d", "libvpx", "libvpx-vp9"),
}
_ATTACHED_PICTURE: Final = 0x400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song
_MOST_CHANNELS: Final = 2
_MOST_RATE: Final = 48_000  # samples per second
_LACKING: Final = 1.0  # seconds by which a file may be shorter than its header says


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """What the headers of a file say. Sizes in pixels as a player shows the video; zeros and "" where there is none."""

    container: str
    codec: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    frames: int = 0
    seconds: float = 0.0
    sound_codec: str = ""
    sample_rate: int = 0
    channels: int = 0


class Media:
    """An opened file. `with Media(data, cut) as media:` closes it. Raises UnreadableMedia, also while it is read."""

    def __init__(self, data: bytes, cut: Cut) -> None:
        container = container_of(data)
        check_whole(data, container)
        self._cut, self._name = cut, container
        options = {"max_pixels": str(cut.max_pixels), "enable_drefs": "0"}
        with _reasons():
            self._file = av.open(io.BytesIO(data), "r", format=container, options=options, metadata_errors="replace")
        try:
            self._video = self._first_video()
            self._sound = next((s for s in self._file.streams.audio if s.codec_context is not None), None)
            self.facts = self._facts()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Media:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def has_video(self) -> bool:
        return self._video is not None

    @property
    def pixel_width(self) -> int:
        """Width of the coded frames, whose pixels need not be square."""
        return self._video.codec_context.width if self._video is not None else 0

    @property
    def has_sound(self) -> bool:
        return self._sound is not None

    def check(self) -> None:
        """Raise UnreadableMedia if the headers say that the file is larger or longer than the recipe allows."""
        cut, facts = self._cut, self.facts
        if facts.seconds > cut.max_seconds:
            raise UnreadableMedia("too_long", f"{facts.seconds:.1f} s; cut.max_seconds allows {cut.max_seconds:g}")
        if self._video is None or cut.sound == "only":
            return
        if facts.frames > cut.max_frames:
            raise UnreadableMedia("too_long", f"{facts.frames} frames; cut.max_frames allows {cut.max_frames}")
        if facts.width * facts.height > cut.max_pixels:
            detail = f"{facts.width} × {facts.height} pixels; cut.max_pixels allows {cut.max_pixels}"
            raise UnreadableMedia("too_many_pixels", detail)
        if 0 < min(facts.width, facts.height) < cut.min_size:
            detail = f"{facts.width} × {facts.height} pixels; cut.min_size is {cut.min_size}"
            raise UnreadableMedia("too_small", detail)

    def frames(self) -> Iterator[tuple[float, float, Any]]:
        """Yield (start, end, decoded frame) in the order of display; times in seconds since the first frame."""
        stream = self._video
        assert stream is not None
        usual = 1 / (self.facts.fps or 25.0)
        first, before, count = 0.0, -1.0, 0
        for frame in self._decoded(stream):
            if frame.is_corrupt:
                if before < 0:  # what comes before the first frame that stands alone
                    continue
                raise UnreadableMedia("corrupt", f"frame {count} is damaged")
            if frame.width * frame.height > self._cut.max_pixels:
                raise UnreadableMedia("too_many_pixels", f"frame {count} has {frame.width} × {frame.height} pixels")
            time = count * usual if frame.time is None else float(frame.time)
            first = time if before < 0 else first
            start, count = time - first, count + 1
            if count > self._cut.max_frames:
                raise UnreadableMedia("too_long", f"more than {self._cut.max_frames} frames; see cut.max_frames")
            if start <= before:
                continue  # shown by no player: its time is past
            if before < 0 and round(frame.rotation / 90) % 2:
                self.facts = replace(self.facts, width=self.facts.height, height=self.facts.width)
            before = start
            length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
            yield start, start + length, frame
        if before < 0:
            raise UnreadableMedia("truncated", "no frame can be decoded")
        if first + before + usual < self.facts.seconds - max(_LACKING, 0.02 * self.facts.seconds) and not self._sound:
            raise UnreadableMedia("truncated", f"it ends after {before + usual:.1f} of {self.facts.seconds:.1f} s")

    def sound(self, *, from_first_frame: float = 0.0) -> Iterator[np.ndarray]:
        """Yield the sound as int16 [samples, channels] from time 0 on, without gaps: silence where there is none.

        Time 0 is `from_first_frame`, the time stamp of the video's first frame in seconds.
        """
        stream = self._sound
        assert stream is not None
        rate, channels = self.sound_format
        resampler = av.AudioResampler(
            format="s16", layout="stereo" if channels == _MOST_CHANNELS else "mono", rate=rate
        )
        position, most = None, round(self._cut.max_seconds * rate) + rate
        for frame in self._decoded(stream):
            time = 0.0 if frame.time is None else float(frame.time) - from_first_frame
            for part in resampler.resample(frame):
                samples = part.to_ndarray().reshape(-1, channels)
                if position is None:
                    position = round(time * rate)
                    if position > 0:
                        yield from _silence(min(position, most), channels)
                    elif position < 0:
                        dropped = min(-position, len(samples))
                        samples, position = samples[dropped:], position + dropped
                if position < 0:
                    dropped = min(-position, len(samples))
                    samples, position = samples[dropped:], position + dropped
                position += len(samples)
                if position > most:
                    raise UnreadableMedia("too_long", f"its sound has more than {self._cut.max_seconds:g} s")
                if len(samples):
                    yield samples

    @property
    def sound_format(self) -> tuple[int, int]:
        """Samples per second and channels of the sound that is kept."""
        wanted = self._cut.sample_rate or min(self.facts.sample_rate, _MOST_RATE)
        return wanted, min(self.facts.channels, _MOST_CHANNELS)

    def rewind(self) -> float:
        """Go back to the start, to read another stream; return the time stamp of the video's first frame (0: none)."""
        with _reasons():
            self._file.seek(0, any_frame=False)
        stream = self._video
        return float(stream.start_time * stream.time_base) if stream is not None and stream.start_time else 0.0

    def _decoded(self, stream: Any) -> Iterator[Any]:
        context = stream.codec_context
        if context.name not in _VIDEO_CODECS and stream.type == "video":
            raise UnreadableMedia("unsupported", f"the codec {context.name} is not read")
        context.thread_count = 1
        context.options = {"max_pixels": str(self._cut.max_pixels)}
        with _reasons():
            yield from self._file.decode(stream)

    def _first_video(self) -> Any:
        streams = [s for s in self._file.streams.video if not int(s.disposition) & _ATTACHED_PICTURE]
        if streams and streams[0].codec_context is None:
            raise UnreadableMedia("unsupported", "its video's codec is not known")
        return streams[0] if streams else None

    def _facts(self) -> MediaFacts:
        sound = self._sound.codec_context if self._sound is not None else None
        heard = (
            {}
            if sound is None
            else {"sound_codec": sound.name, "sample_rate": sound.sample_rate, "channels": sound.channels}
        )
        seconds = (self._file.duration or 0) / av.time_base
        if self._video is None:
            return MediaFacts(self._name, seconds=max(0.0, seconds), **heard)
        stream, context = self._video, self._video.codec_context
        own = float(stream.duration * stream.time_base) if stream.duration else 0.0
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        seconds = max(0.0, seconds, own)
        ratio = stream.sample_aspect_ratio or Fraction(1)
        ratio = ratio if Fraction(1, 16) <= ratio <= 16 else Fraction(1)
        width, height = max(1, round(context.width * ratio)), context.height
        frames = stream.frames or round(seconds * rate)
        return MediaFacts(self._name, context.name, width, height, rate, frames, seconds, **heard)


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Turn errors of FFmpeg into UnreadableMedia."""
    try:
        yield
    except (av.error.PatchWelcomeError, av.error.DecoderNotFoundError, av.error.DemuxerNotFoundError) as error:
        raise UnreadableMedia("unsupported", str(error)) from None
    except (EOFError, av.error.EOFError) as error:
        raise UnreadableMedia("truncated", str(error)) from None
    except (av.error.FFmpegError, ValueError) as error:
        raise UnreadableMedia("corrupt", f"FFmpeg cannot read it ({error})") from None


def _silence(samples: int, channels: int) -> Iterator[np.ndarray]:
    while samples > 0:
        part = min(samples, _MOST_RATE)
        yield np.zeros((part, channels), np.int16)
        samples -= part
