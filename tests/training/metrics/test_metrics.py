"""Metrics against closed forms; the shares of several workers add up."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_clip import write_clip

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training import evaluate
from capstan.training.config.monitoring import ClipSettings, Evaluate, Fid, Kid
from capstan.training.metrics.ceiling import SecondHalf, ceiling
from capstan.training.metrics.clip_score import ClipScore
from capstan.training.metrics.cmmd import ClipDistance
from capstan.training.metrics.fid import FrechetDistance
from capstan.training.metrics.kid import KernelDistance
from capstan.training.metrics.metric import Metric, make_metrics, random_state_kept, single_worker
from capstan.training.metrics.mmd import gaussian, mmd2, polynomial
from capstan.training.metrics.oracle import OracleScore
from capstan.training.metrics.samples import EvalSet, Scenes

CPU = torch.device("cpu")


class Images(EvalSet):
    """Noise, darker or lighter."""

    def __init__(self, count: int, level: int) -> None:
        self.made = np.random.default_rng(level).integers(level, level + 90, (count, 16, 16, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.made)

    def prompts(self, numbers: Sequence[int]) -> list[str]:
        return [f"image {number}" for number in numbers]

    def images(self, numbers: Sequence[int], side: int) -> np.ndarray:
        return self.made[list(numbers)]


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(2).mean(2)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("fid") / "means.pt"
    torch.jit.script(Means()).save(str(file))
    return file


def result(metric: Metric, eval_set: EvalSet, images: np.ndarray, workers: int = 1) -> dict[str, float]:
    """Return the result of `workers` workers together, each with its share of the images."""
    totals: dict[int, list[torch.Tensor]] = {}
    judged = {}
    for last in (False, True):  # first collect what each would send, then return the sums
        for worker in range(workers):
            sent = 0

            def total(tensor: torch.Tensor, worker: int = worker, last: bool = last) -> torch.Tensor:
                nonlocal sent
                sent += 1
                if not last:
                    totals.setdefault(sent, []).append(tensor.clone())
                    return tensor
                return torch.stack(totals[sent]).sum(0)

            if isinstance(metric, FrechetDistance):
                metric.true = {}
            if isinstance(metric, KernelDistance | ClipDistance):
                metric.pair.truth = None
            with metric.ready(CPU):
                numbers = list(range(worker, len(eval_set), workers))
                metric.add(eval_set, numbers, images[numbers])
                judged = metric.result(total)
    return judged


def test_fid_is_the_distance_of_two_gaussians(features: Path) -> None:
    truth, drawn = Images(40, 20), Images(40, 60).made
    metric = FrechetDistance(Fid(features=str(features), trust_torchscript=True), "x")
    metric.check(truth)
    a, b = (p.reshape(40, -1, 3).mean(1).astype(np.float64) for p in (truth.made, drawn))
    product = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).astype(complex)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    expected -= 2 * np.sqrt(product).real.sum()
    assert result(metric, truth, drawn)["fid"] == pytest.approx(expected, rel=1e-4)
    assert result(metric, truth, drawn, workers=3)["fid"] == pytest.approx(expected, rel=1e-4)
    assert result(metric, truth, truth.made)["fid"] == pytest.approx(0, abs=1e-3)


def test_a_frechet_distance_of_too_few_images_is_refused(features: Path, tmp_path: Path) -> None:
    """As many images as features leave the covariances singular: the value would be bias."""
    metric = FrechetDistance(Fid(features=str(features), trust_torchscript=True), "watch.evaluate.fid")
    state = torch.get_rng_state()
    with pytest.raises(RecipeError, match=r"^watch\.evaluate\.count: 3 images are too few .* of 3 features\. Fix: "):
        metric.check(Images(3, 20))
    metric.check(Images(4, 20))
    assert torch.equal(torch.get_rng_state(), state)
    (tmp_path / "inception.pth").touch()
    with pytest.raises(RecipeError, match=r"^x\.count: 1000 images are too few .* of 2048 features"):
        FrechetDistance(Fid(features=str(tmp_path / "inception.pth")), "x.fid").check(Images(1000, 20))


def test_fid_needs_its_file_and_its_packages(features: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "wrong.pth").write_bytes(b"nothing")
    wrong = FrechetDistance(Fid(features=str(tmp_path / "wrong.pth")), "f")
    with pytest.raises(RecipeError, match=r"f\.features: .*wrong\.pth is not a network"), wrong.ready(CPU):
        pass
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(RecipeError, match=r"f\.features: needs the package torchmetrics.*capstan-t2i\[fid\]"):
        FrechetDistance(Fid(features=str(features), trust_torchscript=True), "f").check(Images(2, 0))


def test_clip_score_is_the_mean_cosine(tmp_path: Path) -> None:
    metric, eval_set = ClipScore(ClipSettings(model=str(write_clip(tmp_path / "clip", 0))), "x"), Images(7, 20)
    loaded = metric.tower.load("cpu")
    images = loaded.normalize(loaded.images(np.stack([metric.tower.prepare(p) for p in eval_set.made])))
    texts = loaded.normalize(loaded.texts(eval_set.prompts(range(7))))
    expected = float((images * texts).sum(1).mean())
    assert result(metric, eval_set, eval_set.made)["clip"] == pytest.approx(expected, abs=1e-5)
    assert result(metric, eval_set, eval_set.made, workers=2)["clip"] == pytest.approx(expected, abs=1e-5)


def test_drawings_follow_their_own_prompts_and_not_others() -> None:
    eval_set = Scenes(WorldSource(size=64), 12)
    drawn = eval_set.images(range(12), 64)
    own, others = (
        result(OracleScore("x"), eval_set, drawn),
        result(OracleScore("x"), eval_set, np.roll(drawn, 1, axis=0)),
    )
    assert own["colour_shape"] > 0.9 > 0.5 > others["colour_shape"]
    assert result(OracleScore("x"), eval_set, drawn, workers=5) == pytest.approx(own)


def test_randomness_and_threads_are_left_as_they_were(tmp_path: Path) -> None:
    """Loading a CLIP sets torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    state, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    clip = ClipScore(ClipSettings(model=str(write_clip(tmp_path / "clip", 0))), "x")
    torch.set_rng_state(state)
    torch.set_num_threads(2)
    with random_state_kept(CPU), clip.ready(CPU):
        torch.rand(3)
        np.random.rand(3)
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy).all()
    torch.set_num_threads(before)


def test_the_metrics_are_the_requested_ones(features: Path, tmp_path: Path) -> None:
    clip = ClipSettings(model=str(write_clip(tmp_path / "clip", 0)))
    wanted = Evaluate(
        measures=["fid", "oracle", "clip", "fid"], clip=clip, fid=Fid(features=str(features), trust_torchscript=True)
    )
    assert [type(metric) for metric in make_metrics(wanted, "x")] == [FrechetDistance, OracleScore, ClipScore]
    assert single_worker(torch.ones(2)).tolist() == [1, 1]


class Overwriting(torch.nn.Module):
    """A network that also empties a file of whoever runs it: TorchScript is a program."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        file = torch.from_file(self.path, True, 4, dtype=torch.uint8).zero_()
        return images.float().flatten(2).mean(2) + file.float().sum()


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "run")


def test_torchscript_runs_only_where_the_user_trusts_it(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "features.pt"
    victim.write_bytes(b"mine")
    torch.jit.script(Overwriting(str(victim))).save(str(file))
    images, refused = Images(4, 20), FrechetDistance(Fid(features=str(file)), "f")
    for attempt in (lambda: refused.check(images), lambda: result(refused, images, images.made)):
        with pytest.raises(RecipeError, match=r"f\.features: .*\.pt is TorchScript, .*f\.trust_torchscript: true"):
            attempt()
    assert victim.read_bytes() == b"mine"
    result(FrechetDistance(Fid(features=str(file), trust_torchscript=True), "f"), images, images.made)
    assert victim.read_bytes() == bytes(4)


def test_a_run_cannot_vouch_for_a_program() -> None:
    """Its recipe may be a stranger's: `capstan evaluate` asks its own user."""
    fid = {"features": "/no/x.pt", "trust_torchscript": True}
    recipe = Recipe(dataset="x", train={"watch": {"evaluate": {"measures": ["fid"], "fid": fid}}})
    (metric,) = evaluate._judges(recipe, ["fid"], None, None, 4, "image")
    assert isinstance(metric, FrechetDistance)
    assert not metric.trusted


def test_weights_are_read_without_running_what_a_pickle_holds(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "weights.pth"
    torch.save({"weight": Command(trace)}, file)
    metric = FrechetDistance(Fid(features=str(file)), "f")
    with pytest.raises(RecipeError, match=r"f\.features: .*weights\.pth is not a network"), metric.ready(CPU):
        pass
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [pytest.param(".pth", marks=pytest.mark.slow), ".safetensors"])
def test_inception_reads_its_weights_from_either_format(tmp_path: Path, suffix: str, monkeypatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patched:  # random weights of the right names and shapes
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "empty.pth")
        path = str(tmp_path / "empty.pth")
        weights = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path).state_dict()
    file = tmp_path / f"inception{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, file)
    images = Images(2, 20)
    value = result(FrechetDistance(Fid(features=str(file)), "f"), images, images.made)
    assert value["fid"] == pytest.approx(0, abs=1e-2)


def brute(x: np.ndarray, y: np.ndarray, kernel) -> float:
    """MMD² by its definition, pair by pair."""
    xx = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return xx + yy - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kid_is_the_mmd_of_its_kernel_and_has_no_bias(features: Path) -> None:
    network = Fid(features=str(features), trust_torchscript=True)
    truth, drawn = Images(12, 20), Images(12, 60).made
    whole = KernelDistance(Kid(subsets=2, size=12), network, "x.fid")
    whole.check(truth)
    a, b = (p.reshape(12, -1, 3).mean(1).astype(np.float64) for p in (drawn, truth.made))
    expected = brute(a, b, lambda p, q: (p @ q / 3 + 1) ** 3)
    values = result(whole, truth, drawn)
    assert values["kid"] == pytest.approx(expected, rel=1e-4)
    assert values["kid_std"] == pytest.approx(0, abs=abs(expected) * 1e-9)  # each subset is the whole
    metric = KernelDistance(Kid(subsets=20), network, "x.fid")
    alone, shared = (result(metric, truth, drawn, workers) for workers in (1, 3))
    assert alone == pytest.approx(shared, rel=1e-6)
    assert alone["kid_std"] > 0
    with pytest.raises(RecipeError, match=r"^x\.count: 3 images are too few for kid\. Fix: set count"):
        metric.check(Images(3, 20))


def test_an_unbiased_mmd_of_one_distribution_is_0_on_average() -> None:
    draw = torch.Generator().manual_seed(0)
    for kernel in (polynomial, gaussian):
        pairs = torch.randn(400, 2, 6, 5, generator=draw)
        values = np.array([mmd2(x, y, kernel) for x, y in pairs])
        assert abs(values.mean()) < 4 * values.std() / 20
        assert (values < 0).any()


def test_cmmd_is_the_mmd_of_clips_embeddings(tmp_path: Path) -> None:
    metric, truth = ClipDistance(ClipSettings(model=str(write_clip(tmp_path / "clip", 0))), "x.clip"), Images(7, 20)
    metric.check(truth)
    drawn = Images(7, 90).made
    loaded = metric.tower.load("cpu")
    a, b = (
        loaded.normalize(loaded.images(np.stack([metric.tower.prepare(p) for p in part]))).double().numpy()
        for part in (drawn, truth.made)
    )
    expected = 1000 * brute(a, b, lambda p, q: np.exp(-((p - q) ** 2).sum() / 200))
    assert result(metric, truth, drawn)["cmmd"] == pytest.approx(expected, abs=1e-4)
    metric.pair.truth = None
    assert result(metric, truth, drawn, workers=3)["cmmd"] == pytest.approx(expected, abs=1e-4)


def test_the_ceiling_is_what_true_images_reach_not_0(features: Path) -> None:
    network = Fid(features=str(features), trust_torchscript=True)
    metric, same = (KernelDistance(Kid(subsets=4), network, "x.fid") for _ in range(2))
    truth = Images(40, 20)
    how = {"device": CPU, "batch": 8, "total": single_worker}
    best = ceiling(metric, truth, 16, **how)
    same.check(Images(20, 20))
    halves = SecondHalf(truth)
    assert result(same, halves, truth.made[:20]) == pytest.approx(best)
    assert best["kid"] < result(KernelDistance(Kid(subsets=4), network, "x.fid"), truth, Images(40, 60).made)["kid"]
    assert ceiling(FrechetDistance(network, "x.fid"), Images(6, 20), 16, **how) == {}  # 3 are too few for 3 features


def test_measures_by_default_are_those_that_mean_something() -> None:
    clip, fid = {"model": "m"}, {"features": "inception.pth"}
    assert Evaluate(clip=clip).measures == ["clip", "cmmd"]
    assert Evaluate(fid=fid).measures == ["kid"]  # 1000 images are too few for a Fréchet distance of 2048 features
    assert Evaluate(fid=fid, count=2049).measures == ["kid", "fid"]
    assert Evaluate(cmmd=clip).measures == ["cmmd"]
    with pytest.raises(ValueError, match=r"names no network to measure with; set clip"):
        Evaluate()
    for measure, needs in (("kid", "fid"), ("cmmd", "cmmd")):
        with pytest.raises(ValueError, match=rf"measure {measure} needs {needs}"):
            Evaluate(measures=[measure])
    wanted = Evaluate(clip=clip, fid=fid)
    assert wanted.terms("kid")["judge"] == {"features": "inception.pth", "subsets": 100, "size": None}
    assert wanted.terms("cmmd")["judge"] == {"model": "m", "pretrained": None}


def test_open_nsfw_is_a_feature_network_that_needs_no_file() -> None:
    truth = Images(8, 20)
    kid = KernelDistance(Kid(subsets=2, size=8), Fid(features="open_nsfw"), "watch.evaluate.fid")
    kid.check(truth)
    near, far = (result(kid, truth, Images(8, level).made)["kid"] for level in (21, 160))
    assert near < far
    assert kid.pair.truth is not None
    assert kid.pair.truth.shape == (8, 1024)
    with pytest.raises(RecipeError, match="8 images are too few for a Fréchet distance of 1024 features"):
        FrechetDistance(Fid(features="open_nsfw"), "watch.evaluate.fid").check(truth)
