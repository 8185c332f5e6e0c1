"""Whether sounds, alone or with clips, are what their prompts state: the oracle of the sounding world

Sounds are judged by FFT and onsets (pipeline.world.moving.oracle); nothing is learnt. What shall sound is read from the
prompts, so that any dataset whose captions name things as the sounding world's do can be judged. Of clips with sound,
`in_time` compares the two, whatever the prompt: the share of the things seen whose pitch starts within a frame of their
entry. What is judged of a film is a pair (frames, sound).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import read
from capstan.pipeline.world.moving.oracle import (
    FRAME_MEASURES,
    SOUND_MEASURES,
    in_time,
    listen,
    score_heard,
    score_stated,
    watch,
)
from capstan.training.data.sounds import Form, to_samples
from capstan.training.drawing.drawer import Drawn, Kind, SoundCodec
from capstan.training.drawing.grid import sheet
from capstan.training.metrics.clips import check_things
from capstan.training.metrics.metric import Means, single_worker
from capstan.training.metrics.samples import EvalSet

_HEARD: Final = {name: "sounds" if name == "count" else name for name in SOUND_MEASURES}  # `count` is of what is seen
_SHOWN: Final = 8  # sounds in a sheet of before and after


class SoundOracle(Means):
    """The mean of each measure of sounds: pitch, pitch with rhythm, the number of things, and all in order."""

    name: ClassVar[str] = "oracle"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sound"})
    measures: ClassVar[Sequence[str]] = SOUND_MEASURES
    rate = 0  # of the sounds seen last

    def check(self, eval_set: EvalSet) -> None:
        check_things(eval_set, self.field, "sound", "sounding")

    def seen(self, drawn: Drawn) -> np.ndarray:
        assert drawn.rate is not None, "sounds have a rate"
        self.rate = drawn.rate
        return drawn.arrays

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add sounds, float [N, values, channels] in −1 … 1 at the rate of those seen, for the prompts `numbers`."""
        for prompt, sound in zip(eval_set.prompts(numbers), images, strict=True):
            wanted = [(thing.colour, thing.shape) for thing in read(prompt).things]
            self.count(score_heard(wanted, listen(to_samples(sound), self.rate)))


class FilmOracle(Means):
    """The mean of each measure of clips, of sounds, and of both together."""

    name: ClassVar[str] = "oracle"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"film"})
    measures: ClassVar[Sequence[str]] = (*FRAME_MEASURES, *_HEARD.values(), "in_time")
    rate, fps = 0, 0.0  # of the films seen last

    def check(self, eval_set: EvalSet) -> None:
        check_things(eval_set, self.field, "be seen and heard", "sounding")

    def seen(self, drawn: Drawn) -> np.ndarray:
        assert drawn.rate is not None, "sounds have a rate"
        assert drawn.fps is not None, "clips have a rate"
        assert drawn.sounds is not None, "films have sounds"
        self.rate, self.fps = drawn.rate, drawn.fps
        return pairs(drawn.arrays, drawn.sounds)

    def mismatched(self, images: np.ndarray) -> np.ndarray:
        """Return the films, each with the sound of the one before."""
        frames, sounds = zip(*images, strict=True)
        return pairs(frames, [*sounds[-1:], *sounds[:-1]])

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add films [N], (uint8 [frames, H, W, 3], float [values, channels]) each, for the prompts `numbers`."""
        for prompt, (frames, sound) in zip(eval_set.prompts(numbers), images, strict=True):
            stated, shown, heard = read(prompt), watch(frames), listen(to_samples(sound), self.rate)
            scores = score_stated(stated, shown)
            sounding = score_heard([(thing.colour, thing.shape) for thing in stated.things], heard)
            scores |= {_HEARD[name]: value for name, value in sounding.items()}
            self.count(scores | {"in_time": in_time(shown, heard, self.fps)})


def pairs(frames: Sequence[Any] | np.ndarray, sounds: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Return films [N], each a pair of frames and sound."""
    made = np.empty(len(frames), dtype=object)
    for number, pair in enumerate(zip(frames, sounds, strict=True)):
        made[number] = pair
    return made


def measure_codec(codec: SoundCodec, subjects: EvalSet, *, batch: int) -> tuple[dict[str, Any], Any]:
    """Return what is left of true sounds after a first stage, with chance levels, and a sheet of before and after.

    `snr`, the ratio of signal to noise in dB; chance: silence. The oracle's measures, where the captions state what
    sounds; chance: sounds of other captions.
    """
    numbers = range(len(subjects))
    true = subjects.sounds(numbers, Form(codec.rate, codec.channels, codec.values))
    made = codec.reconstruct(true, batch)
    measures = {"snr": {"value": round(signal_to_noise(true, made), 3), "chance": 0.0}}
    judge = SoundOracle("--measures")
    with contextlib.suppress(RecipeError):
        judge.check(subjects)
        value, chance = (
            _judged(judge, subjects, [(n + shift) % len(made) for n in numbers], Drawn("sound", made, rate=codec.rate))
            for shift in (0, 1)
        )
        measures |= {name: {"value": round(value[name], 4), "chance": round(chance[name], 4)} for name in value}
    shown = np.stack([true, made], axis=1).reshape(-1, *true.shape[1:])[: 2 * _SHOWN]
    labels = ["original", "decoded"] * (len(shown) // 2)
    return {"measures": measures}, sheet(Drawn("sound", shown, rate=codec.rate), labels, columns=4)


def signal_to_noise(true: np.ndarray, made: np.ndarray) -> float:
    """Return 10 log10(Σ x² / Σ (x − y)²) of all sounds together, in dB: as silent ones have no ratio of their own."""
    noise = float(np.square(true.astype(np.float64) - made).sum())
    return float(10 * np.log10(max(float(np.square(true, dtype=np.float64).sum()), 1e-10) / max(noise, 1e-10)))


def _judged(judge: SoundOracle, subjects: EvalSet, numbers: Sequence[int], drawn: Drawn) -> dict[str, float]:
    with judge.ready(torch.device("cpu")):
        judge.add(subjects, numbers, judge.seen(drawn))
        return judge.result(single_worker)
