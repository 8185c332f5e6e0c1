"""Films that are right score 1 in everything, and those with another's sound are not in time."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
import pytest
import torch
from sounding import RATE, scene

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import descriptive
from capstan.pipeline.world.moving.render import frames_of, samples_of
from capstan.training.data.sounds import to_wave
from capstan.training.drawing.clips import mp4_of
from capstan.training.drawing.drawer import Drawn, joined
from capstan.training.drawing.grid import sheet
from capstan.training.metrics.metric import single_worker
from capstan.training.metrics.samples import EvalSet
from capstan.training.metrics.sounds import FilmOracle

COUNT = 12


class Stated(EvalSet):
    """Prompts that describe the sounding world's scenes."""

    def __len__(self) -> int:
        return COUNT

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return [descriptive(scene(number)) for number in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        raise NotImplementedError


class Nothing(Stated):
    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return ["a lake at dawn" for _ in numbers]


def films(numbers: Sequence[int] = range(COUNT)) -> Drawn:
    """True films of scenes."""
    frames = np.stack([frames_of(scene(number), 32) for number in numbers])
    sounds = [to_wave(torch.from_numpy(samples_of(scene(number), RATE))).numpy() for number in numbers]
    return Drawn("film", frames, fps=8.0, rate=RATE, sounds=np.stack(sounds))


def measured(judge: FilmOracle, numbers: Sequence[int], seen: np.ndarray) -> dict[str, float]:
    with judge.ready(torch.device("cpu")):
        judge.add(Stated(), numbers, seen)
        return judge.result(single_worker)


def test_true_films_are_right_and_those_with_another_sound_are_not() -> None:
    judge, drawn = FilmOracle("measures"), films()
    judge.check(Stated())
    seen = judge.seen(drawn)
    right = measured(judge, range(COUNT), seen)
    assert right.pop("steady") < 1  # things enter one after the other, and prompts do not say when
    assert right == dict.fromkeys(right, 1.0)
    others = [(number + 1) % COUNT for number in range(COUNT)]
    chance = measured(judge, others, judge.mismatched(seen))
    assert chance["in_time"] < 0.4
    assert chance["in_order"] < 0.2
    swapped = measured(judge, range(COUNT), judge.mismatched(seen))
    assert (swapped["colours"], swapped["in_time"]) == (1.0, chance["in_time"])


def test_prompts_must_say_what_is_seen_and_heard() -> None:
    with pytest.raises(RecipeError, match=r"^measures: .*shall be seen and heard, and 'a lake at dawn' names no"):
        FilmOracle("measures").check(Nothing())


def test_shares_of_workers_are_joined_with_their_sounds() -> None:
    whole = films(range(3))
    again = joined([films([0, 2]), films([1])], 3)
    assert np.array_equal(again.arrays, whole.arrays)
    assert again.sounds is not None
    assert np.array_equal(again.sounds, whole.sounds)
    assert len(whole.first(2).sounds) == 2  # type: ignore[arg-type]


def test_a_sheet_has_frames_above_a_spectrogram() -> None:
    drawn = films(range(2))
    picture = np.asarray(sheet(drawn, ["one", "two"]))
    strip = picture[12 : 12 + 96, 12 : 12 + 16 * 96]
    enlarged = np.concatenate(list(drawn.arrays[0].repeat(3, axis=1).repeat(3, axis=2)), axis=1)
    assert np.array_equal(strip, enlarged)
    heard = picture[12 + 96 : 12 + 192, 12 : 12 + 16 * 96].mean((0, 2))
    first = round(min(moving.enters for moving in scene(0).things) / 16 * len(heard))
    assert heard[first + 20 : first + 60].mean() > 1.5 * heard[: max(1, first - 20)].mean() or first < 40


def test_the_mp4_has_the_sound() -> None:
    drawn = films([3])
    with av.open(io.BytesIO(mp4_of(drawn, 0))) as film:
        rate = film.streams.audio[0].codec_context.sample_rate
        heard = np.concatenate([part.to_ndarray()[0] for part in film.decode(film.streams.audio[0])])
    true = samples_of(scene(3), RATE)[:, 0] / 32768
    level = np.abs(heard[: 2 * rate]).reshape(40, -1).max(1)
    wanted = np.abs(true).reshape(40, -1).max(1)
    assert rate == 48_000
    assert np.corrcoef(level, wanted)[0, 1] > 0.9
