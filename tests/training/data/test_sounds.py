"""Sounds of a dataset as a model reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sounding
from moving import tone

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.media.codec import decode_flac, encode_flac
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.sounds import Form, batch_of, form_of, piece_of, pieces_of, to_samples, to_wave


def open_sounds(folder: Path, parts: tuple[str, ...] = ("flac",)) -> TrainingData:
    return TrainingData(Dataset(Storage(str(folder))), Data(layer=None), 7, layer=None, parts=parts)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sounding.write_sounds(tmp_path_factory.mktemp("sounds") / "ds", [3, 2])


def test_a_sample_has_the_files_that_are_read(sounds: Path) -> None:
    alone, both = open_sounds(sounds).sample(4), open_sounds(sounds, ("jpg", "flac")).sample(4)
    samples, rate = decode_flac(alone.parts["flac"])
    assert (samples == sounding.samples_of(sounding.scene(4), sounding.RATE)).all()
    assert rate == sounding.RATE
    assert alone.jpeg == b""
    assert both.jpeg.startswith(b"\xff\xd8")
    assert both.parts == alone.parts
    assert open_sounds(sounds, ("jpg",)).sample(4).parts == {}


def test_a_dataset_without_the_files_is_refused(sounds: Path) -> None:
    with pytest.raises(RecipeError, match=r"^dataset: the model reads files \.mp4, .*source\.parts: \[mp4\]"):
        open_sounds(sounds, ("mp4",))


def test_a_flipped_bit_of_a_sound_is_found(sounds: Path, tmp_path: Path) -> None:
    folder = sounding.write_sounds(tmp_path / "ds", [2])
    row = Dataset(Storage(str(folder))).table("shard-000000").to_pylist()[1]
    tar = folder / "shards" / "shard-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[row["flac_offset"] + row["flac_size"] // 2] ^= 1
    tar.write_bytes(damaged)
    assert open_sounds(folder).sample(0).parts["flac"]
    with pytest.raises(DamagedFile):
        open_sounds(folder).sample(1)


def test_a_piece_is_cut_or_followed_by_silence() -> None:
    samples = tone(1.0, 4000)
    flac = encode_flac(samples, 4000)
    short, long = Form(4000, 1, 1000), Form(4000, 1, 6000)
    first = piece_of(flac, short)
    assert (first.samples == samples[:1000]).all()
    assert (first.start_s, first.total_s) == (0.0, 1.0)
    later = piece_of(flac, short, np.random.default_rng(1))
    start = round(later.start_s * 4000)
    assert start > 0
    assert (later.samples == samples[start : start + 1000]).all()
    whole = piece_of(flac, long, np.random.default_rng(1))
    assert (whole.samples[:4000] == samples).all()
    assert not whole.samples[4000:].any()
    assert batch_of([whole, whole]).shape == (2, 1, 6000)
    assert (to_samples(to_wave(batch_of([whole])).numpy()[0].T) == whole.samples).all()


@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (2000, 2)])
def test_rate_and_channels_are_the_models(rate: int, channels: int) -> None:
    flac = encode_flac(tone(1.0, 4000, 440), 4000)
    made = piece_of(flac, Form(rate, channels, rate)).samples.astype(float)
    assert made.shape == (rate, channels)
    assert abs(int(np.abs(np.fft.rfft(made[:, -1])).argmax()) - 440) <= 1
    assert 0.9 < np.abs(made[rate // 4 : -rate // 4]).max() / 8000 < 1.1


def test_the_form_is_that_of_the_first_sound_unless_it_is_set(sounds: Path) -> None:
    samples = open_sounds(sounds)
    unset = SimpleNamespace(rate=None, channels=None, seconds=None)
    assert form_of(samples, unset, 64, "train.oobleck") == Form(4000, 1, 8000)
    assert form_of(samples, SimpleNamespace(rate=2000, channels=2, seconds=1.0), 64, "train.x") == Form(2000, 2, 1984)
    with pytest.raises(RecipeError, match=r"^train\.x\.seconds: 0\.01 s at 4000 .* less than a latent of 64"):
        form_of(samples, SimpleNamespace(rate=None, channels=None, seconds=0.01), 64, "train.x")
    with pytest.raises(ValueError, match="no sound"):
        pieces_of([open_sounds(sounds, ("jpg",)).sample(0)], Form(4000, 1, 100))
