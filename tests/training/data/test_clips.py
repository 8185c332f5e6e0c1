"""Clips of a dataset as a model sees them: the frames that are chosen, and no others decoded."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from moving_clips import FRAMES, SIDE, mp4_of, sample, scene, write_clips

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.media import codec
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.moving.render import frames_of as drawn_frames
from capstan.training.config import Data
from capstan.training.data.bad_samples import BadSamples
from capstan.training.data.clips import chosen, clips_of, first_rate, frames_of
from capstan.training.data.dataset import TrainingData
from capstan.training.data.loader import Loader


def numbered(count: int) -> np.ndarray:
    """Frames that tell their number by their grey."""
    return np.stack([np.full((16, 24, 3), 40 + 5 * number, np.uint8) for number in range(count)])


def numbers_in(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 40) / 5) for frame in frames]


def test_frames_are_those_of_the_middle_or_of_a_random_part() -> None:
    mp4 = mp4_of(numbered(24))
    assert numbers_in(frames_of(mp4, 4, None, (16, 16))) == [10, 11, 12, 13]
    assert numbers_in(frames_of(mp4, 4, 4.0, (16, 16))) == [8, 10, 12, 14]
    starts = set()
    for seed in range(12):
        found = numbers_in(frames_of(mp4, 3, 4.0, (16, 16), np.random.default_rng(seed)))
        assert found == [found[0], found[0] + 2, found[0] + 4]
        starts.add(found[0])
    assert len(starts) > 5
    assert frames_of(mp4, 2, None, (8, 8)).shape == (2, 8, 8, 3)
    assert chosen(9, 30.0, 3, 10.0) == [1, 4, 7]


def test_no_frame_after_the_last_one_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    mp4, seen = mp4_of(numbered(40)), list[int]()
    real = codec._rgb
    monkeypatch.setattr(codec, "_rgb", lambda *given: (seen.append(1), real(*given))[1])
    assert numbers_in(frames_of(mp4, 2, None, (16, 16))) == [19, 20]
    assert len(seen) == 2
    with av.open(io.BytesIO(mp4)) as file:  # a key frame at least every second: a start within reach
        keys = [number for number, frame in enumerate(file.decode(video=0)) if frame.key_frame]
    assert np.diff([*keys, 40]).max() <= 8


def test_a_clip_that_is_too_short_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its clip has 6 frames at 8 per second, which are not 8 frames"):
        frames_of(sample(0).parts["mp4"], 8, None, (16, 16))
    folder = write_clips(tmp_path / "ds", [8])
    data = TrainingData(Dataset(Storage(str(folder))), Data(layer=None), 7, layer=None, parts=("jpg", "mp4"))
    short = data.at(3).key

    def prepare(samples):  # as a family does, of which one sample's clip is too short
        for one in samples:
            frames_of(one.parts["mp4"], 8 if one.key == short else FRAMES, None, (SIDE, SIDE))
        return {}

    bad = BadSamples(tmp_path / "bad.jsonl", 1)
    with Loader(data, prepare, batch=8, start=0, stop=1, bad=bad) as loader:
        (loaded,) = list(loader)
    assert short not in loaded.keys
    assert bad.count(1) == 1


def test_an_image_is_a_video_of_one_frame(tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "ds", [4], images=2)
    data = TrainingData(Dataset(Storage(str(folder))), Data(layer=None), 7, layer=None, parts=("jpg", "mp4"))
    samples = [data.sample(index) for index in range(4)]
    clips, still = clips_of(samples, FRAMES, None, (SIDE, SIDE))
    assert (clips.shape, clips.dtype) == ((4, FRAMES, 3, SIDE, SIDE), np.uint8)
    assert still.tolist() == [True, True, False, False]
    assert (clips[0] == clips[0, :1]).all()
    for index in (2, 3):
        wanted = drawn_frames(scene(index), SIDE).transpose(0, 3, 1, 2).astype(int)
        assert np.abs(clips[index] - wanted).mean() < 4
    assert first_rate(data) == 8.0


def test_a_dataset_of_images_alone_has_no_clips(squares: Path) -> None:
    data = TrainingData(Dataset(Storage(str(squares))), Data(layer=None), 7, layer=None, parts=("jpg", "mp4"))
    assert data.sample(0).jpeg
    assert not data.sample(0).parts
