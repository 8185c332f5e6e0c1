"""What is measured of a clip's video and sound, on clips of which it is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from moving import RED, WHITE, movie, plain, tone

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.media.codec import encode_flac
from capstan.pipeline.score import registry
from capstan.pipeline.score.moving import SoundMeasures, VideoMeasures
from capstan.pipeline.score.scorer import Sample


def video(frames: list[np.ndarray], fps: int = 8) -> dict[str, float]:
    found = VideoMeasures().score([Sample("", part=movie(frames, fps=fps))])
    return {name: float(values[0]) for name, values in found.items()}


def sound(samples: np.ndarray, rate: int = 8000) -> dict[str, float]:
    found = SoundMeasures().score([Sample("", part=encode_flac(samples, rate))])
    return {name: float(values[0]) for name, values in found.items()}


def textured(width: int = 96, height: int = 64) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return pixels.repeat(8, 0).repeat(8, 1)


@pytest.mark.parametrize(("pixels", "fps"), [(1, 8), (2, 8), (1, 16)])
def test_motion_is_in_pixels_per_second(pixels: int, fps: int) -> None:
    frames = [np.roll(textured(), pixels * number, axis=1) for number in range(16)]
    assert video(frames, fps)["video_motion"] == pytest.approx(pixels * fps, rel=0.35)


def test_motion_does_not_depend_on_the_size() -> None:
    large = [np.roll(textured().repeat(2, 0).repeat(2, 1), 4 * number, axis=1) for number in range(16)]
    small = [np.roll(textured(), 2 * number, axis=1) for number in range(16)]
    assert video(large)["video_motion"] == pytest.approx(video(small)["video_motion"], rel=0.2)


def test_what_stands_still_is_static() -> None:
    still = video([textured()] * 16)
    assert still["video_static"] == 1
    assert still["video_motion"] < 0.2
    half = [np.roll(textured(), 5 * max(0, number - 8), axis=1) for number in range(17)]
    assert video(half)["video_static"] == pytest.approx(0.5, abs=0.07)


def test_bars_are_measured_and_one_bright_frame_ends_them() -> None:
    frame = plain(RED)
    frame[:16] = frame[-16:] = 0
    assert video([frame] * 8)["video_letterbox"] == pytest.approx(0.5, abs=0.04)
    assert video([frame] * 7 + [plain(WHITE)])["video_letterbox"] == 0
    assert video([plain((0, 0, 0))] * 8)["video_letterbox"] == 1


def test_loudness_silence_and_clipping() -> None:
    half = tone(1.0, level=16_384)
    assert sound(half)["sound_loudness"] == pytest.approx(-6.02 - 3.01, abs=0.05)
    quiet = np.concatenate([half, np.zeros_like(half)])
    assert sound(quiet)["sound_silence"] == pytest.approx(0.5, abs=0.01)
    assert sound(np.zeros((8000, 2), np.int16)) == {
        "sound_loudness": -120.0, "sound_silence": 1.0, "sound_clipping": 0.0
    }  # fmt: skip
    clipped = np.clip(tone(1.0, level=32_000).astype(np.int32) * 2, -32_768, 32_767).astype(np.int16)
    assert sound(clipped)["sound_clipping"] == pytest.approx(2 / 3, abs=0.03)
    assert sound(half)["sound_clipping"] == 0


def recipe(score: dict[str, Any], parts: list[str] | None) -> Recipe:
    return Recipe.model_validate({"dataset": "x", "source": {"path": "x.tar", "parts": parts}, "score": score})


@pytest.mark.parametrize(("name", "parts"), [("video", None), ("video", ["flac"]), ("sound", ["mp4"])])
def test_parts_that_are_not_carried_cannot_be_measured(name: str, parts: list[str] | None) -> None:
    with pytest.raises(RecipeError, match=r"source\.parts does not name"):
        registry.scorers(recipe({name: {}}, parts))
    assert len(registry.scorers(recipe({name: {}}, ["mp4", "flac"]))) == 1
