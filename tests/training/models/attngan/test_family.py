"""The family attngan: attention, discriminators, runs that resume, ablations, and exports that open elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_runs import assert_killed_run_ends_as_whole, made_elsewhere, small_run
from tiny_runs import records

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.attngan.config import JudgeSettings
from capstan.training.models.attngan.discriminators import Discriminator, JudgeAdversary, Shown, squared_gradient
from capstan.training.models.attngan.family import AttnganFamily, kl_divergence
from capstan.training.models.damsm.modeling_attngan import AttnGANConfig, AttnGANModel
from capstan.training.models.own_model import load_own
from capstan.training.product import family_of
from capstan.training.sample import open_sampler
from capstan.training.trainer import fit

DAMSM = {"words": 6, "channels": 8, "tower": [8, 8]}
JUDGE = {"channels": 8, "penalty": 1.0, "penalty_every": 2}
SMALL = {"noise": 4, "condition": 4, "channels": 8, "stages": 2, "generators": 2, "blocks": 1, "discriminator": JUDGE}
PROMPTS = ["a red square", "a blue square, number 7"]

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("attngan")

    def recipe(run: str, steps: int = 4, attngan: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = small_run("attngan", root / run, steps)
        settings = {"damsm": str(root / "damsm")} | SMALL | (attngan or {})
        return Recipe(dataset=str(squares), train=base | {"attngan": settings} | section)

    fit(recipe("damsm", model="damsm", damsm=DAMSM))
    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return Path(fit(make("run"))["run"])


@pytest.fixture
def model() -> AttnGANModel:
    torch.manual_seed(0)
    shape = {"noise": 4, "condition": 4, "channels": 8, "stages": 3, "generators": 2, "blocks": 1}
    config = AttnGANConfig(["a", "red", "blue", "square"], words=6, text_channels=8, image_size=32, **shape)
    return AttnGANModel(config).eval()


def test_the_last_stages_draw_and_all_but_the_first_attend(model: AttnGANModel) -> None:
    made = model.made(PROMPTS, [0, 1])
    assert [tuple(image.shape) for image in made.images] == [(2, 3, 16, 16), (2, 3, 32, 32)]
    assert [tuple(weights.shape) for weights in made.attention] == [(2, 6, 8, 8), (2, 6, 16, 16)]
    assert all(float(image.abs().max()) <= 1 for image in made.images)
    for weights in made.attention:
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
        assert weights[0, 3:].abs().max() == 0  # the prompt has three words


@pytest.mark.parametrize(("size", "stages"), [(16, 2), (16, 3), (64, 3), (64, 2)])
def test_sizes_and_stages_fit_each_other(size: int, stages: int) -> None:
    config = AttnGANConfig(["a"], words=2, text_channels=4, noise=2, condition=2, channels=4, image_size=size)
    config.stages, config.generators = stages, stages
    sides = [image.shape[-1] for image in AttnGANModel(config).made(["a"], [0]).images]
    assert sides == [size >> level for level in reversed(range(stages))]


def test_an_image_depends_on_its_prompt_and_seed_alone(model: AttnGANModel) -> None:
    both, one = model.draw(PROMPTS, [3, 4]), model.draw(PROMPTS[:1], [3])
    assert np.abs(both[0].astype(int) - one[0]).max() <= 1
    assert np.abs(model.draw(PROMPTS[:1], [5])[0].astype(int) - one[0]).max() > 1
    assert np.abs(model.draw(["a blue square"], [3])[0].astype(int) - one[0]).max() > 0


def test_shuffled_attention_goes_to_other_words_of_the_same_prompt(model: AttnGANModel) -> None:
    whole, shuffled = (model.made(PROMPTS[1:], [3], shuffled=yes).attention[0] for yes in (False, True))
    torch.testing.assert_close(whole.sort(1).values, shuffled.sort(1).values)  # the first stage sees the same features
    assert not torch.equal(whole, shuffled)
    single = [model.made(["red"], [3], shuffled=yes).images[-1] for yes in (False, True)]
    assert torch.equal(*single)  # one word has no other


def test_a_discriminator_judges_each_image_alone() -> None:
    torch.manual_seed(0)
    judge, images, sentences = Discriminator(16, 8, 5), torch.randn(4, 3, 16, 16), torch.randn(4, 5)
    alone, joint = judge(images, [sentences])
    assert alone.shape == joint.shape == (4,)
    for ours, theirs in zip(judge(images[1:2], [sentences[1:2]]), (alone, joint), strict=True):
        torch.testing.assert_close(ours, theirs[1:2])
    assert not torch.allclose(joint, judge(images, [sentences.roll(1, 0)])[1])


@pytest.mark.parametrize("kind", ["vanilla", "hinge"])
def test_the_discriminators_loss_counts_other_sentences_as_wrong(kind: str) -> None:
    torch.manual_seed(0)
    adversary = JudgeAdversary(JudgeSettings(channels=8, loss=kind), [8, 16], 5)
    images = [[torch.randn(3, 3, side, side) for side in (8, 16)] for _ in range(2)]
    sentences, others = torch.randn(3, 5), torch.randn(3, 5)
    ours, _ = adversary.adversarial_loss(Shown(*images, sentences, others))
    theirs, metrics = adversary.loss()

    def bad(logits: torch.Tensor, real: bool) -> torch.Tensor:
        signed = logits if real else -logits
        return (1 - signed).relu() if kind == "hinge" else F.softplus(-signed)

    expected, wanted = torch.tensor(0.0), torch.tensor(0.0)
    for judge, made, real in zip(adversary.model, *images, strict=True):
        of_real, own, other = judge(real, [sentences, others])
        of_made, drawn = judge(made, [sentences])
        wrong = torch.cat([bad(drawn, False), bad(other, False)]).mean()
        expected = expected + (bad(of_real, True).mean() + bad(of_made, False).mean()) / 2
        expected = expected + (bad(own, True).mean() + wrong) / 2
        for logits in (of_made, drawn):
            wanted = wanted + (-logits if kind == "hinge" else F.softplus(-logits)).mean() / 2
    torch.testing.assert_close(theirs, expected)
    torch.testing.assert_close(ours, wanted)
    assert "penalty" not in metrics


def test_the_penalty_is_the_squared_gradient_and_is_due_now_and_then() -> None:
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert (
        float(squared_gradient((images * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)).sum((1, 2, 3)), images)) == 48 * 5
    )
    adversary = JudgeAdversary(JudgeSettings(channels=8, penalty=2.0, penalty_every=4), [8], 5)
    seen = []
    for step in range(5):
        adversary.number = step
        shown = Shown([torch.randn(2, 3, 8, 8)], [torch.randn(2, 3, 8, 8)], torch.randn(2, 5), torch.randn(2, 5))
        adversary.adversarial_loss(shown)
        seen.append("penalty" in adversary.loss()[1])
    assert seen == [True, False, False, False, True]


def test_the_divergence_is_that_of_gaussians() -> None:
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, log_variance), expected)


def test_a_run_logs_both_sides_and_draws(run: Path) -> None:
    log = records(run)
    names = {"adversarial", "discriminator", "told_apart", "kl", "words", "sentences", "rival_grad_norm"}
    assert names <= log[-1].keys()
    assert ["penalty" in record for record in log] == [True, False, True, False]
    drawn = open_sampler(run).draw(PROMPTS, [0, 1]).arrays
    assert (drawn.shape, drawn.dtype) == ((2, 16, 16, 3), np.uint8)
    with pytest.raises(RecipeError, match=r"^--guidance: this model has no such setting"):
        open_sampler(run).draw(PROMPTS, [0, 1], guidance=3.0)


def test_the_value_of_the_loss_says_nothing_of_who_is_ahead(run: Path) -> None:
    for record in records(run):
        matching = record["words"] + record["sentences"]
        assert record["loss"] == pytest.approx(record["kl"] + 5.0 * matching, rel=1e-4)


def test_the_number_of_parts_changes_nothing_that_is_learnt(make: Make) -> None:
    same = {"eps": 10.0, "lr": 1e-2, "ema": None, "clip": None, "weight_decay": 0.0, "warmup": 0}
    logs = [records(Path(fit(make(f"parts-{parts}", 2, accumulate=parts, **same))["run"])) for parts in (1, 4)]
    for whole, split in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "words", "sentences", "discriminator", "rival_grad_norm", "kl"):
            assert split[name] == pytest.approx(whole[name], rel=1e-3), name


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "model.safetensors", tmp_path)


def test_the_export_draws_our_images_without_capstan(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "AttnGANModel"
    assert [path.name for path in folder.glob("*.py")] == ["modeling_attngan.py"]
    made = made_elsewhere(f"made = model.draw({PROMPTS!r}, seeds=[3, 4])", folder, tmp_path)
    for path in (run, folder):  # an export is opened here, too
        assert np.abs(open_sampler(path).draw(PROMPTS, [3, 4]).arrays.astype(int) - made).max() <= 1


def test_it_is_measured_with_and_without_its_attention(run: Path) -> None:
    assert family_of(run / "product") is AttnganFamily
    result = evaluate(run, count=6, world=WorldSource(scenes=10, size=16))
    assert set(result["ablations"]["shuffled_attention"]) == set(result["measures"])
    assert json.loads((run / "evaluation.json").read_text())["ablations"] == result["ablations"]
    assert (run / "evaluation-attention.png").read_bytes().startswith(b"\x89PNG")


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    before = load_own(AttnGANModel, run, "RUN").state_dict()
    after = fit(make("next", 1, ema=None, init=str(run), lr=1e-12))["run"]
    for key, weight in load_own(AttnGANModel, after, "RUN").state_dict().items():
        torch.testing.assert_close(weight, before[key], atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("other", 1, {"channels": 4}, init=str(run)))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"damsm": "/no/damsm"}, r"train\.attngan\.damsm: no model at /no/damsm"),
        ({"generators": 3}, r"train\.attngan: .*generators 3 is more than stages 2"),
        ({"stages": 4}, r"train\.attngan\.stages: 4 stages for 16 pixels start at 2"),
        ({"stages": 3, "generators": 3}, r"train\.attngan\.generators: the smallest of 3 images"),
        ({"discriminator": {"loss": "best"}}, r"train\.attngan\.discriminator\.loss"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        fit(make(f"wrong-{'-'.join(section)}", 1, section))
    assert caught.value.exit_code == 2


def test_two_models_need_an_engine_for_two() -> None:
    section = {"model": "attngan", "run": "unused", "steps": 1, "attngan": {"damsm": "./damsm"}}
    with pytest.raises(RecipeError, match=r"train\.engine\.strategy: deepspeed trains one model"):
        TrainConfig.from_section(section)
    with pytest.raises(RecipeError, match=r"train\.precision: fp16 needs loss scaling"):
        TrainConfig.from_section(section | {"engine": {"strategy": "ddp"}, "precision": "fp16"})
