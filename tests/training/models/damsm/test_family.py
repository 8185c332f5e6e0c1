"""The family damsm: the loss by the paper's formulas, runs that resume, R-precision, exports that open elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import assert_killed_run_ends_as_whole, made_elsewhere, small_run
from tiny_runs import records

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training.distributed.step import Step
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.metrics.r_precision import r_precision
from capstan.training.models.damsm.config import DamsmSettings
from capstan.training.models.damsm.family import DamsmFamily, vocabulary_of
from capstan.training.models.damsm.losses import matched, matching, share_gradients, word_scores
from capstan.training.models.damsm.modeling_attngan import DamsmModel, TextEncoder
from capstan.training.models.own_model import load_own
from capstan.training.product import family_of
from capstan.training.trainer import fit

SMALL = {"words": 6, "channels": 8, "tower": [8, 8]}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("damsm")

    def recipe(run: str, steps: int = 4, damsm: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = small_run("damsm", root / run, steps)
        return Recipe(dataset=str(squares), train=base | {"damsm": SMALL | (damsm or {})} | section)

    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return Path(fit(make("run"))["run"])


def features(count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random features of `count` pairs, of two regions and up to three words."""
    torch.manual_seed(count)
    shapes = {"regions": (2, 5), "images": (5,), "words": (3, 5), "sentences": (5,)}
    lengths = torch.arange(count) % 3 + 1
    return {name: torch.randn(count, *shape) for name, shape in shapes.items()}, torch.arange(3) < lengths[:, None]


def by_the_paper(regions: torch.Tensor, words: torch.Tensor, settings: DamsmSettings) -> float:
    """Equations 7 to 10 for one image and one caption, loop by loop."""
    scores = [[math.exp(float(e @ v)) for v in regions] for e in words]
    total = [sum(row[region] for row in scores) for region in range(len(regions))]
    relevance = 0.0
    for e, row in zip(words, scores, strict=True):
        sharp = [math.exp(settings.gamma_regions * s / t) for s, t in zip(row, total, strict=True)]
        context = sum(weight / sum(sharp) * v for weight, v in zip(sharp, regions, strict=True))
        relevance += math.exp(settings.gamma_words * float(context @ e / (context.norm() * e.norm())))
    return math.log(relevance) / settings.gamma_words


def test_words_and_regions_match_by_the_papers_formulas() -> None:
    found, mask = features(4)
    settings = DamsmSettings(gamma_regions=4.0, gamma_words=3.0)
    scores = word_scores(found["regions"], found["words"], mask, settings)
    for image in range(4):
        for caption in range(4):
            expected = by_the_paper(found["regions"][image], found["words"][caption][mask[caption]], settings)
            assert float(scores[image, caption]) == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_score_and_has_no_gradient() -> None:
    found, mask = features(4)
    found["words"].requires_grad_()
    loss = matching(found, mask, DamsmSettings()).total
    (gradient,) = torch.autograd.grad(loss, found["words"])
    assert gradient[~mask].abs().max() == 0
    assert gradient.isfinite().all()
    other = {**found, "words": torch.where(mask[:, :, None], found["words"], 100.0)}
    torch.testing.assert_close(matching(other, mask, DamsmSettings()).total, loss)


def test_parts_have_the_gradient_of_the_whole() -> None:
    found, mask = features(6)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in found.items()}
    whole = matching(leaves, mask, DamsmSettings()).total
    expected = torch.autograd.grad(whole, list(leaves.values()))
    rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
    parts = [{**{name: leaf[row] for name, leaf in leaves.items()}, "mask": mask[row]} for row in rows]
    share_gradients(
        parts, Step(parts=3), lambda part: {name: part[name] for name in (*leaves, "mask")}, DamsmSettings()
    )
    losses = [matched({n: part[n] for n in leaves}, part["mask"], part, DamsmSettings())[0] for part in parts]
    total = torch.stack(losses).mean()  # as the engine does
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total, list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_number_of_parts_changes_nothing_that_is_learnt(make: Make) -> None:
    same = {"eps": 10.0, "lr": 3.0, "ema": None, "clip": None, "weight_decay": 0.0, "warmup": 0}
    logs = [records(Path(fit(make(f"parts-{parts}", 2, accumulate=parts, **same))["run"])) for parts in (1, 4)]
    for whole, split in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "words", "sentences", "matched"):
            assert split[name] == pytest.approx(whole[name], rel=2e-4), name


def test_a_text_is_encoded_whatever_else_is_in_its_batch() -> None:
    encoder = TextEncoder(["a", "red", "square"], 5, 8)
    ids = encoder.ids(["A red, square!", "unheard", "", "a red a red a red a red"])
    assert ids.tolist() == [[2, 3, 4, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [2, 3, 2, 3, 2]]
    words, sentence = encoder(ids)
    alone, one = encoder(ids[:1])
    torch.testing.assert_close(words[0], alone[0])
    torch.testing.assert_close(sentence[0], one[0])
    assert words[0, 3:].abs().max() == 0
    assert vocabulary_of(["b a b", "c a"], 2) == ["a", "b"]


def test_it_learns_which_caption_is_whose(make: Make) -> None:
    log = records(Path(fit(make("learns", 60, {"tower": [16, 16]}, lr=1e-2, warmup=5))["run"]))
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert {"words", "sentences", "matched"} <= log[-1].keys()


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "model.safetensors", tmp_path)


def test_the_export_compares_images_and_texts_without_capstan(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "DamsmModel"
    assert [path.name for path in folder.glob("*.py")] == ["modeling_attngan.py"]
    code = (
        "images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)\n"
        "made = model.similarity(images, ['a red square', 'a blue square']).numpy()"
    )
    made = made_elsewhere(code, folder, tmp_path)
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    for path in (run, folder):  # an export is opened here, too
        ours = load_own(DamsmModel, path, "RUN").similarity(images, ["a red square", "a blue square"])
        np.testing.assert_allclose(made, ours.numpy(), atol=1e-5)


def test_it_is_measured_by_r_precision(run: Path) -> None:
    assert family_of(run / "product") is DamsmFamily
    result = evaluate(run, count=8, world=WorldSource(scenes=10, size=16))
    assert result["measures"]["r_precision"]["chance"] == pytest.approx(1 / 8)
    assert 0 <= result["measures"]["r_precision"]["value"] <= 1
    assert (run / "evaluation.png").is_file()


def test_r_precision_counts_images_that_prefer_their_own_text() -> None:
    texts = [str(number) for number in range(200)]
    assert r_precision(np.eye(200), texts)["r_precision"] == {"value": 1.0, "chance": 0.01}
    assert r_precision(1 - np.eye(200), texts)["r_precision"]["value"] == 0.0
    assert r_precision(np.zeros((200, 200)), texts)["r_precision"]["value"] == 0.0  # no preference is no find
    random = np.random.default_rng(0).random((2000, 2000))
    found = r_precision(random, [str(number) for number in range(2000)])["r_precision"]["value"]
    assert found == pytest.approx(0.01, abs=0.007)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    before = load_own(DamsmModel, run, "RUN").state_dict()
    after = fit(make("next", 1, ema=None, init=str(run), lr=1e-12))["run"]
    for key, weight in load_own(DamsmModel, after, "RUN").state_dict().items():
        torch.testing.assert_close(weight, before[key], atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("other", 1, {"channels": 4}, init=str(run)))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"channels": 7}, r"train\.damsm\.channels"),
        ({"tower": [8]}, r"train\.damsm\.tower"),
        ({"size": 18}, r"train\.damsm\.size: 18 pixels do not divide by 4"),
        ({"gamma": 0}, r"train\.damsm\.gamma"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        fit(make(f"wrong-{next(iter(section))}", 1, section))
    assert caught.value.exit_code == 2
