"""The oracle of the sounding world as a metric."""

from __future__ import annotations

import numpy as np
import pytest
import sounding
import torch

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.config.monitoring import Evaluate
from capstan.training.data.dataset import TrainingData
from capstan.training.data.sounds import Form
from capstan.training.drawing.drawer import Drawn, SoundCodec
from capstan.training.metrics.metric import make_metrics, single_worker
from capstan.training.metrics.samples import HeldOut, Scenes
from capstan.training.metrics.sounds import SoundOracle, measure_codec, signal_to_noise

COUNT = 12


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    folder = sounding.write_sounds(tmp_path_factory.mktemp("sounds") / "ds", [COUNT + 2])
    data = Data(layer=None, holdout=COUNT)
    return HeldOut(TrainingData(Dataset(Storage(str(folder))), data, 0, layer=None, parts=("flac",)), COUNT)


def judged(subjects: HeldOut, sounds: np.ndarray, numbers: list[int]) -> dict[str, float]:
    (judge,) = make_metrics(Evaluate(measures=["oracle"]), "train.watch.evaluate", "sound")
    judge.check(subjects)
    with judge.ready(torch.device("cpu")):
        judge.add(subjects, numbers, judge.seen(Drawn("sound", sounds, rate=sounding.RATE)))
        return judge.result(single_worker)


def test_true_sounds_are_right_and_those_of_other_prompts_are_not(subjects: HeldOut) -> None:
    true = subjects.sounds(range(COUNT), Form(sounding.RATE, 1, 8000))
    assert judged(subjects, true, list(range(COUNT))) == dict.fromkeys(
        ("pitch", "pitch_rhythm", "count", "in_order"), 1
    )
    others = judged(subjects, true, [(number + 1) % COUNT for number in range(COUNT)])
    assert others["in_order"] < 0.3
    assert judged(subjects, np.zeros_like(true), list(range(COUNT)))["pitch"] == 0


def test_prompts_must_name_what_sounds(subjects: HeldOut) -> None:
    class Mute(HeldOut):
        def prompts(self, numbers: object) -> list[str]:
            return ["a dog barks"]

    with pytest.raises(RecipeError, match=r"^--measures: oracle reads from prompts .*'a dog barks' names no coloured"):
        SoundOracle("--measures").check(Mute(subjects.data, 1))
    with pytest.raises(RecipeError, match=r"^dataset: it has no sounds"):
        Scenes.sounds(subjects, [0], Form(4000, 1, 8000))  # type: ignore[arg-type]


class HalfAsLoud(SoundCodec):
    rate, channels, values = sounding.RATE, 1, 8000

    def reconstruct(self, sounds: np.ndarray, batch: int) -> np.ndarray:
        return sounds / 2


def test_a_first_stage_is_compared_with_the_truth(subjects: HeldOut) -> None:
    result, image = measure_codec(HalfAsLoud(), subjects, batch=4)
    assert result["measures"]["snr"] == {"value": 6.021, "chance": 0.0}
    assert result["measures"]["pitch"]["value"] == 1
    assert result["measures"]["pitch"]["chance"] < 1
    assert min(image.size) > 500
    true = np.ones((1, 4, 1), np.float32)
    assert signal_to_noise(true, np.zeros_like(true)) == 0
