"""Drawn clips, with their sound if they have any → MP4 and GIF files"""

from __future__ import annotations

import io
from typing import Final

import numpy as np

from capstan.training.drawing.drawer import Drawn
from capstan.training.drawing.sounds import samples_of

_PLAYED: Final = 48_000  # samples per second of the sound in an MP4: AAC has few rates
_SIDE: Final = 256  # pixels: smaller clips are enlarged by a whole factor, which also keeps their colours in 4:2:0


def mp4_of(drawn: Drawn, number: int) -> bytes:
    """Return drawn clip `number` as an MP4 that players and browsers show; the sound of a film is AAC."""
    from capstan.pipeline.config.cut import Cut
    from capstan.pipeline.media.codec import Scaler, VideoWriter, resampled, with_sound

    frames = _shown(drawn.arrays[number])
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # 4:2:0 has even sides
    height, width = frames.shape[1:3]
    fps = max(1, round(drawn.fps or 1))
    writer, scaler = VideoWriter(width, height, fps, Cut(crf=12)), Scaler(width, height, "yuv420p")
    try:
        for frame in frames:
            writer.add(scaler.from_rgb(np.ascontiguousarray(frame)))
        mp4 = writer.finish()
    finally:
        writer.close()
    if drawn.sounds is None:
        return mp4
    assert drawn.rate is not None, "sounds have a rate"
    return with_sound(mp4, resampled(samples_of(drawn, number), drawn.rate, _PLAYED), _PLAYED, "aac")


def gif_of(drawn: Drawn, number: int) -> bytes:
    """Return drawn clip `number` as a GIF that repeats."""
    from PIL import Image

    first, *others = (Image.fromarray(frame) for frame in _shown(drawn.arrays[number]))
    length = round(1000 / (drawn.fps or 1))
    first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=others, duration=length, loop=0)
    return buffer.getvalue()


def _shown(frames: np.ndarray) -> np.ndarray:
    """Return frames, uint8 [frames, H, W, 3], enlarged by a whole factor to about _SIDE pixels."""
    factor = max(1, _SIDE // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
