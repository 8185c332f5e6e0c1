"""Distances of clips and sounds by a network that the user names, and how like their neighbours frames are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from small_clip import write_clip

from capstan.pipeline.errors import RecipeError
from capstan.training.config.monitoring import ClipSettings, Evaluate, Fid
from capstan.training.data.sounds import Form
from capstan.training.drawing.drawer import Drawn
from capstan.training.metrics.ceiling import ceiling
from capstan.training.metrics.clip_score import FrameConsistency
from capstan.training.metrics.fid import MediaDistance, SoundDistance, frechet
from capstan.training.metrics.metric import check_kinds, make_metrics, single_worker
from capstan.training.metrics.samples import EvalSet

FRAMES, SIDE, VALUES = 4, 8, 50


class OfClips(torch.nn.Module):
    """Mean brightness of the first and the last frame."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        means = clips.float().mean([1, 3, 4])
        return torch.stack([means[:, 0], means[:, -1]], 1)


class OfSounds(torch.nn.Module):
    """Loudness."""

    def forward(self, sounds: torch.Tensor) -> torch.Tensor:
        return sounds.square().mean([1, 2])[:, None]


class Media(EvalSet):
    """Random clips and sounds."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.all = rng.integers(0, 256, (count, FRAMES, 1, 1, 1)) + rng.integers(-9, 9, (count, FRAMES, SIDE, SIDE, 3))
        self.all = self.all.clip(0, 255).astype(np.uint8)
        self.heard = (rng.random((count, 1, 1)) * rng.standard_normal((count, VALUES, 1))).astype(np.float32)

    def __len__(self) -> int:
        return len(self.all)

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return ["" for _ in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        raise AssertionError("these are no images")

    def clips(self, numbers: Sequence[int], frames: int, fps: float, side: int) -> np.ndarray:
        assert (frames, fps, side) == (FRAMES, 8.0, SIDE)
        return self.all[list(numbers)]

    def sounds(self, numbers: Sequence[int], form: Form) -> np.ndarray:
        assert form == Form(100, 1, VALUES)
        return self.heard[list(numbers)]


def script(network: torch.nn.Module, file: Path) -> Fid:
    torch.jit.script(network).save(str(file))
    return Fid(features=str(file), trust_torchscript=True)


def distance(metric: MediaDistance, truth: EvalSet, drawn: Drawn) -> float:
    metric.check(truth)
    seen = metric.seen(drawn)
    with metric.ready(torch.device("cpu")):
        for start in range(0, len(seen), 16):
            metric.add(truth, range(start, min(len(seen), start + 16)), seen[start : start + 16])
        return metric.result(single_worker)[metric.name]


def clips(media: Media) -> Drawn:
    return Drawn("clip", media.all, fps=8.0)


def test_the_distance_of_clips_is_that_of_their_features(tmp_path: Path) -> None:
    metric = MediaDistance(script(OfClips(), tmp_path / "net.pt"), "x")
    truth, other = Media(40, 0), Media(40, 1)
    assert distance(metric, truth, clips(truth)) == pytest.approx(0, abs=1e-6)
    found = distance(metric, truth, clips(other))  # the truth's sums are kept
    x, y = (media.all.mean((2, 3, 4))[:, [0, -1]] for media in (truth, other))
    moments = [(torch.from_numpy(part.mean(0)), torch.from_numpy(np.cov(part.T))) for part in (x, y)]
    assert found == pytest.approx(frechet(*moments), rel=1e-6)
    assert found > 1
    bright = Drawn("clip", (other.all // 2 + 128).astype(np.uint8), fps=8.0)
    assert distance(metric, truth, bright) > 20 * found


def test_frechet_of_one_dimension() -> None:
    """(μ − μ')² + (σ − σ')²."""
    one, other = ((torch.tensor([m]).double(), torch.tensor([[s * s]]).double()) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    assert frechet(one, other) == pytest.approx(9 + 2.25)


def test_sounds_and_the_distance_of_two_halves(tmp_path: Path) -> None:
    metric = MediaDistance(script(OfSounds(), tmp_path / "net.pt"), "x")
    truth = Media(40, 0)
    drawn = Drawn("sound", truth.heard, rate=100)
    assert distance(metric, truth, drawn) == pytest.approx(0, abs=1e-9)
    unused = MediaDistance(Fid(features=str(metric.file), trust_torchscript=True), "x")
    unused.seen(drawn)
    halves = ceiling(unused, truth, SIDE, device=torch.device("cpu"), batch=8, total=single_worker)
    assert 0 < halves["fid"] < 0.1


def test_the_sounds_of_films_have_a_distance_of_their_own(tmp_path: Path) -> None:
    metric = SoundDistance(script(OfSounds(), tmp_path / "net.pt"), "x")
    truth, other = Media(40, 0), Media(40, 1)
    film = Drawn("film", other.all, fps=8.0, rate=100, sounds=truth.heard)
    assert metric.name == "fad"
    assert distance(metric, truth, film) == pytest.approx(0, abs=1e-9)  # whatever its frames are
    alone = SoundDistance(Fid(features=str(metric.file), trust_torchscript=True), "x")
    heard = distance(alone, truth, Drawn("sound", other.heard, rate=100))
    assert heard > 0
    assert distance(metric, truth, Drawn("film", truth.all, fps=8.0, rate=100, sounds=other.heard)) == heard
    wanted = Evaluate(count=40, fad=Fid(features="net.pt"), measures=["fad"])
    assert [type(one) for one in make_metrics(wanted, "x", "film")] == [SoundDistance]
    with pytest.raises(RecipeError, match="fad judges films and sounds, and this model draws clips"):
        check_kinds([metric], "clip", "x")


@pytest.mark.parametrize(
    ("name", "trusted", "count", "field"),
    [
        ("absent.pt", True, 40, r"^w\.fid\.features: .*absent\.pt is not on this machine"),
        ("net.pth", True, 40, r"^w\.fid\.features: net\.pth is no TorchScript"),
        ("net.pt", False, 40, r"^w\.fid\.features: .*trust_torchscript: true"),
        ("net.pt", True, 2, r"^w\.count: 2 are too few for a Fréchet distance of 2 features"),
        ("sounds.pt", True, 40, r"^w\.fid\.features: .*sounds\.pt does not take \[16, 3, 4, 8, 8\]"),
    ],
)
def test_what_cannot_be_measured_is_named(tmp_path: Path, name: str, trusted: bool, count: int, field: str) -> None:
    script(OfClips(), tmp_path / "net.pt")
    torch.jit.script(torch.nn.Linear(50, 2)).save(str(tmp_path / "sounds.pt"))
    (tmp_path / "net.pth").write_bytes(b"x")
    metric = MediaDistance(Fid(features=str(tmp_path / name), trust_torchscript=trusted), "w.fid")
    media = Media(count, 0)
    with pytest.raises(RecipeError, match=field):
        distance(metric, media, clips(media))


def consistency(metric: FrameConsistency, seen: np.ndarray) -> float:
    with metric.ready(torch.device("cpu")):
        metric.add(Media(1, 0), range(len(seen)), seen)
        return metric.result(single_worker)["consistency"]


def test_frames_that_do_not_change_are_consistent(tmp_path: Path) -> None:
    metric = FrameConsistency(ClipSettings(model=str(write_clip(tmp_path / "clip", 0))), "x")
    rng = np.random.default_rng(0)
    still = rng.integers(0, 256, (5, 1, 16, 16, 3), dtype=np.uint8).repeat(FRAMES, axis=1)
    assert consistency(metric, still) == pytest.approx(1, abs=1e-5)
    mixed = metric.mismatched(still)
    assert np.array_equal(mixed[1, 2], still[3, 0])
    assert consistency(metric, mixed) < 0.99
    films = np.empty(5, dtype=object)
    for number, clip in enumerate(still):
        films[number] = clip, np.zeros((VALUES, 1))
    assert consistency(metric, films) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(metric.mismatched(films), mixed)


def test_the_kind_of_model_chooses_the_metric(tmp_path: Path) -> None:
    clip, fid = ClipSettings(model=str(write_clip(tmp_path / "clip", 0))), script(OfClips(), tmp_path / "net.pt")
    wanted = Evaluate(count=8, measures=["fid", "consistency"], clip=clip, fid=fid)
    assert [type(metric) for metric in make_metrics(wanted, "x", "clip")] == [MediaDistance, FrameConsistency]
    with pytest.raises(RecipeError, match=r"^m: consistency judges clips and films, and this model draws images"):
        check_kinds(make_metrics(wanted, "x"), "image", "m")
    with pytest.raises(ValueError, match="measure consistency needs clip"):
        Evaluate(count=8, measures=["consistency"])
