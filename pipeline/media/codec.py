"""Frames and samples ↔ bytes of clips, by PyAV (FFmpeg)

One thread, fixed settings and no metadata: equal frames give equal bytes with one version of PyAV.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Final

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from capstan.pipeline.config.cut import Cut
from capstan.pipeline.media.colour import is_hdr, source_matrix, to_sdr

_STEREO: Final = 2
_BT709: Final = 1
_LIMITED, _FULL = 1, 2  # AVCOL_RANGE_MPEG, AVCOL_RANGE_JPEG
_SCALING: Final = Interpolation.AREA  # exact rounding would cost more than all of decoding


class Scaler:
    """Scales the frames of one video, one after the other: what swscale prepares for a size is made once."""

    def __init__(self, width: int, height: int, pixel_format: str) -> None:
        self._size, self._format = (width, height), pixel_format
        self._first, self._last, self._small = (VideoReformatter() for _ in range(3))

    def scaled(self, frame: Any) -> Any:
        """Return a decoded frame as a player shows it: upright, in BT.709 and limited range, ready to be encoded."""
        turn, deep = round(frame.rotation / 90) % 4, is_hdr(int(frame.color_trc))
        width, height = reversed(self._size) if turn % 2 else self._size
        direct = not turn and not deep
        shown = self._first.reformat(
            frame,
            width,
            height,
            self._format if direct else "rgb48le" if deep else "rgb24",
            src_colorspace=source_matrix(int(frame.colorspace), frame.height),
            dst_colorspace=Colorspace.ITU709 if direct else None,
            src_color_range=_FULL if int(frame.color_range) == _FULL or "yuvj" in frame.format.name else _LIMITED,
            dst_color_range=_LIMITED if direct else _FULL,
            interpolation=_SCALING,
            threads=1,
        )
        if direct:
            return shown
        pixels = shown.to_ndarray()
        pixels = to_sdr(pixels, int(frame.color_trc)) if deep else pixels
        return self.from_rgb(np.ascontiguousarray(np.rot90(pixels, turn)))

    def from_rgb(self, pixels: np.ndarray) -> Any:
        """Return RGB pixels (uint8 [H, W, 3]) as a frame in BT.709, ready to be encoded."""
        return self._last.reformat(
            av.VideoFrame.from_ndarray(pixels, format="rgb24"),
            format=self._format,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=_LIMITED,
            interpolation=_SCALING,
            threads=1,
        )

    def small(self, frame: Any, size: tuple[int, int]) -> np.ndarray:
        """Return a scaled frame as RGB (uint8 [H, W, 3]) of `size` (width, height)."""
        return _rgb(self._small, frame, size)


def _rgb(reformatter: VideoReformatter, frame: Any, size: tuple[int, int]) -> np.ndarray:
    """Return a frame in BT.709 and limited range as RGB."""
    shown = reformatter.reformat(
        frame,
        *size,
        "rgb24",
        src_colorspace=Colorspace.ITU709,
        src_color_range=_LIMITED,
        dst_color_range=_FULL,
        interpolation=_SCALING,
        threads=1,
    )
    found: np.ndarray = shown.to_ndarray()
    return found


class VideoWriter:
    """Encodes frames to an MP4 of H.264 in memory. `close` must be called; the bytes are in `finish`'s result."""

    def __init__(self, width: int, height: int, fps: int, cut: Cut) -> None:
        self._buffer, self.frames, self._tick = io.BytesIO(), 0, Fraction(1, fps)
        self._file = av.open(self._buffer, "w", format="mp4", container_options={"fflags": "+bitexact"})
        stream = self._stream = self._file.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format_of(cut)
        context = stream.codec_context
        context.thread_count, context.gop_size = 1, fps
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        context.options = {
            "crf": str(cut.crf),
            "preset": "veryfast",
            "flags": "+bitexact+cgop",
            # mbtree reads memory that nothing has written: the first second's bytes would differ from run to run.
            "x264-params": f"open-gop=0:keyint={fps}:threads=1:mbtree=0",
        }

    def add(self, frame: Any) -> None:
        """Encode a frame that a Scaler returned; it may be added again."""
        frame.pts, frame.time_base = self.frames, self._tick
        self._file.mux(self._stream.encode(frame))
        self.frames += 1

    def finish(self) -> bytes:
        """Return the file."""
        self._file.mux(self._stream.encode(None))
        self._file.close()
        return self._buffer.getvalue()

    def close(self) -> None:
        """Free what the encoder holds, whether it has finished or not."""
        with contextlib.suppress(av.error.FFmpegError, ValueError):
            self._file.close()


def pixel_format_of(cut: Cut) -> str:
    """Return FFmpeg's name of the clips' pixel format."""
    return f"yuv{cut.chroma}p"


Wanted = list[int] | Callable[[int, float], list[int]]


def decode_frames(mp4: bytes, wanted: Wanted) -> list[np.ndarray]:
    """Return the frames of these numbers (ascending) of a clip, as RGB (uint8 [H, W, 3]).

    `wanted` may be a function of the clip's number of frames and their rate. Decoding starts at the key frame before
    the first one and ends with the last one. Raises ValueError for a clip without these frames.
    """
    found, reformatter = list[np.ndarray](), VideoReformatter()
    with av.open(io.BytesIO(mp4), "r", format="mov") as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        if callable(wanted):
            wanted = wanted(stream.frames, float(stream.average_rate))
        unit = 1 / (stream.average_rate * stream.time_base)  # ticks per frame
        file.seek(round(wanted[0] * unit), stream=stream)
        for frame in file.decode(stream):
            number = round(frame.pts / unit)
            while len(found) < len(wanted) and wanted[len(found)] <= number:
                found.append(_rgb(reformatter, frame, (frame.width, frame.height)))
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise ValueError(f"the clip ends before its frame {wanted[len(found)]}")
    return found


def frame_rate(mp4: bytes) -> float:
    """Return the frames per second of a clip, by its header."""
    with av.open(io.BytesIO(mp4), "r", format="mov") as file:
        return float(file.streams.video[0].average_rate)


def clip_frames(mp4: bytes, side: int) -> tuple[list[np.ndarray], float]:
    """Return all frames of a clip as RGB (uint8 [H, W, 3]), with at most `side` pixels on the shorter side; and fps."""
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(mp4), "r", format="mov") as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        scale = min(1.0, side / min(stream.codec_context.width, stream.codec_context.height))
        size = (round(stream.codec_context.width * scale), round(stream.codec_context.height * scale))
        return [_rgb(reformatter, frame, size) for frame in file.decode(stream)], float(stream.average_rate)


def encode_flac(samples: np.ndarray, rate: int) -> bytes:
    """Return samples (int16 [samples, channels]) as a FLAC file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac", container_options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream("flac", rate=rate)
        channels = samples.shape[1]
        stream.codec_context.layout = "stereo" if channels == _STEREO else "mono"
        stream.codec_context.format = "s16"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"flags": "+bitexact"}
        for start in range(0, len(samples), 4096):
            block = np.ascontiguousarray(samples[start : start + 4096]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, "s16", "stereo" if channels == _STEREO else "mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def with_sound(mp4: bytes, samples: np.ndarray, rate: int, codec: str = "flac") -> bytes:
    """Return a clip with samples (int16 [samples, channels]) as its sound: FLAC, or AAC, which all players know.

    The frames are copied. AAC does not keep the samples, and needs a rate that it has, such as 48,000.
    """
    buffer, layout = io.BytesIO(), "stereo" if samples.shape[1] == _STEREO else "mono"
    with (
        av.open(io.BytesIO(mp4), "r", format="mov") as clip,
        av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as file,
    ):
        shown = clip.streams.video[0]
        copied = file.add_stream_from_template(shown)
        heard = file.add_stream(codec, rate=rate, options={"flags": "+bitexact"})
        heard.codec_context.layout, heard.codec_context.thread_count = layout, 1
        for packet in clip.demux(shown):
            if packet.dts is not None:
                packet.stream = copied
                file.mux(packet)
        given = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), "s16", layout)
        given.sample_rate, given.pts, given.time_base = rate, 0, Fraction(1, rate)
        sizes = heard.codec_context.frame_size or len(samples)
        resampler = av.AudioResampler(heard.codec_context.format, layout, rate, frame_size=sizes)
        for part in (given, None):
            for frame in resampler.resample(part):
                file.mux(heard.encode(frame))
        file.mux(heard.encode(None))
    return buffer.getvalue()


def decode_flac(data: bytes) -> tuple[np.ndarray, int]:
    """Return the samples (int16 [samples, channels]) of a clip's FLAC, and their rate."""
    parts = []
    with av.open(io.BytesIO(data), "r", format="flac") as file:
        stream = file.streams.audio[0]
        stream.codec_context.thread_count = 1
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        parts = [frame.to_ndarray().reshape(-1, channels) for frame in file.decode(stream)]
    return np.concatenate(parts) if parts else np.zeros((0, channels), np.int16), rate


def decode_sound(data: bytes, rate: int, channels: int) -> np.ndarray:
    """Return the samples (int16 [samples, channels]) of a clip's FLAC at another rate, as mono or stereo."""
    samples, stored = decode_flac(data)
    samples = resampled(samples, stored, rate)
    if samples.shape[1] > channels:  # loudness is kept: FFmpeg would make a stereo of a mono more quiet
        return np.rint(samples.mean(axis=1, keepdims=True)).astype(np.int16)
    return np.repeat(samples, channels // samples.shape[1], axis=1)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return samples (int16 [samples, channels]) of one rate at another."""
    if rate == wanted or not len(samples):
        return samples
    layout = "stereo" if samples.shape[1] == _STEREO else "mono"
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples).reshape(1, -1), "s16", layout)
    frame.sample_rate = rate
    resampler = av.AudioResampler("s16", layout, wanted)
    parts = [part.to_ndarray() for given in (frame, None) for part in resampler.resample(given)]
    return np.concatenate([part.reshape(-1, samples.shape[1]) for part in parts])
