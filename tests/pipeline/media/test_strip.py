"""A clip as one image: its frames in order, and its waveform; also on contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from moving import BLUE, GREEN, RED, WHITE, middle, movie, seconds_of, tone, write_clips
from PIL import Image

from capstan.pipeline.media.codec import encode_flac
from capstan.pipeline.media.spectrogram import spectrogram
from capstan.pipeline.media.strip import picture_of, sheet_of_frames
from capstan.pipeline.report.contact_sheet import write_sheet
from capstan.pipeline.report.report import write_report
from capstan.pipeline.storage import Storage


def near(found: list[int], colour: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 12


def test_frames_are_in_the_order_of_time() -> None:
    mp4 = movie(seconds_of([RED, GREEN, BLUE, WHITE], each=1.0), colours={"colorspace": 1})
    sheet = sheet_of_frames(mp4, 32)
    quarters = [sheet[:64, :96], sheet[:64, -96:], sheet[-64:, :96], sheet[-64:, -96:]]
    assert [near(middle(part), colour) for part, colour in zip(quarters, (RED, GREEN, BLUE, WHITE), strict=True)] == [
        True
    ] * 4
    assert sheet_of_frames(mp4, 32, count=1).shape == (64, 96, 3)
    assert sheet_of_frames(movie(seconds_of([RED], each=0.25)), 2).shape == (64, 194, 3)


def test_a_waveform_is_below_the_frames_or_alone() -> None:
    mp4, flac = movie(seconds_of([RED], each=2.0)), encode_flac(tone(2.0), 8000)
    both = picture_of(mp4, flac, 16, 192)
    alone = picture_of(None, flac, 16, 192)
    silent = picture_of(mp4, encode_flac(np.zeros((16_000, 1), np.int16), 8000), 16, 192)
    assert both is not None
    assert alone is not None
    assert silent is not None
    assert max(both.shape) <= 192
    assert both.shape[0] > silent.shape[0]
    assert alone.shape == (48, 192, 3)
    assert (alone[24] < 255).any()
    assert picture_of(None, None, 1, 192) is None


def test_the_spectrogram_of_a_sound_alone_is_above_its_waveform() -> None:
    samples = np.concatenate([np.zeros((8000, 1), np.int16), tone(1.0)])  # silence, then a tone
    picture = picture_of(None, encode_flac(samples, 8000), 32, 192, spectrogram(samples, 8000))
    assert picture is not None
    assert picture.shape == (192, 192, 3)
    above, wave = picture[:142], picture[144:]
    assert above[:, :90].max() < 60 < 200 < above[:, 100:].max(), "both begin halfway"
    assert (wave[:, :95] < 255).any(axis=2).sum(axis=0).max() == 1 < (wave[:, 100:] < 255).any(axis=2).sum(axis=0).max()


def test_contact_sheets_show_frames_and_waveforms(tmp_path: Path) -> None:
    dataset = write_clips(tmp_path)
    write_sheet(Storage(str(dataset)), ["outcome=kept"], tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    for colour in (RED, GREEN):  # of the first and the last frames: a middle frame shows one of them
        assert (np.abs(pixels - colour).max(axis=2) <= 14).mean() > 0.005
    assert (np.abs(pixels - (40, 80, 140)).max(axis=2) <= 40).any(), "a waveform"
    page = Path(write_report(Storage(str(dataset)))).read_text()
    assert page.count("96 × 64 · 3.0 s") == 2, "the report says how long a clip is"
