"""The family dalle: what is learnt, on which first stages, tokens encoded ahead, and runs that resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import assert_killed_run_ends_as_whole
from tiny_runs import records

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.data.transforms import to_signed
from capstan.training.models.dalle.family import DalleFamily
from capstan.training.models.dalle.tokens import emptied, open_first_stage, prompt_ids
from capstan.training.precomputed.latents import LatentsJob, plan, reader
from capstan.training.trainer import fit

Make = Callable[..., Recipe]


@pytest.fixture
def opened(make: Make, run: Path) -> tuple[DalleFamily, TrainingData]:
    recipe = make("run")
    train = TrainConfig.from_recipe(recipe)
    torch.manual_seed(0)
    family = DalleFamily(train, run / "assets")
    return family, TrainingData(Dataset(Storage(recipe.dataset)), train.data, 0, layer=None)


def test_prompts_end_where_the_image_begins_and_lose_their_words_alone(opened: Any) -> None:
    tokenizer = opened[0].tokenizer
    ids, mask = prompt_ids(tokenizer, ["a red square", "a"], 24)
    assert (ids[:, -1] == tokenizer.end).all()
    assert ids[0, 0] == tokenizer.start
    assert mask.sum(1).tolist() == [2 + len(tokenizer.ids("a red square")), 3]
    assert ids[1][mask[1].bool()].tolist() == [tokenizer.start, *tokenizer.ids("a"), tokenizer.end]
    empty = emptied(ids, tokenizer, torch.tensor([True, False]))
    assert (empty[0, 1:-1] == tokenizer.vocab_size).all()
    assert torch.equal(empty[1], ids[1])
    assert prompt_ids(tokenizer, ["a red square " * 20], 8)[0].shape == (1, 8)


def test_a_token_is_predicted_from_what_stands_before_it(opened: Any) -> None:
    family, model = opened[0], opened[0].model.eval()
    ids, mask = prompt_ids(family.tokenizer, ["a red square", "a"], 24)
    tokens = torch.randint(32, (2, 64))
    with torch.no_grad():
        before = model(ids, mask, tokens)
        later = tokens.clone()
        later[:, 20] = (later[:, 20] + 1) % 32
        after = model(ids, mask, later)
        alone = model(*prompt_ids(family.tokenizer, ["a"], 24), tokens[1:])
        other = model(*prompt_ids(family.tokenizer, ["a blue square", "a"], 24), tokens)
    torch.testing.assert_close(after.image[:, :21], before.image[:, :21])
    assert (after.image[:, 21:] - before.image[:, 21:]).abs().amax(-1).min() > 0
    torch.testing.assert_close(alone.image[0], before.image[1], atol=1e-5, rtol=1e-4)  # padding changes nothing
    assert (other.image[0] - before.image[0]).abs().max() > 1e-4
    assert before.text.shape[1] == ids.shape[1] - 1
    assert before.image.shape == (2, 64, 32)


def test_the_loss_weights_text_and_image_and_hides_dropped_captions(make: Make, opened: Any) -> None:
    family, data = opened
    batch = family.prepare([data.at(number) for number in range(6)])
    with torch.no_grad():
        loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(1))
        assert float(loss) == pytest.approx(float(metrics["text"]) / 8 + float(metrics["image"]) * 7 / 8, rel=1e-5)
        family.train = family.train.model_copy(update={"drop_text": 0.999999})
        loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(1))
        assert metrics["text"] == 0
        others = family.prepare([data.at(number) for number in range(6)])
        words = (others["ids"] != family.tokenizer.start) & (others["ids"] != family.tokenizer.end)
        others["ids"] = torch.where(words, (others["ids"] + 7) % 500, others["ids"])
        assert float(family.loss(family.model, others, torch.Generator().manual_seed(1))[0]) == float(loss)


def test_tokens_encoded_ahead_are_those_of_the_images(make: Make, opened: Any, tmp_path: Path) -> None:
    family, data = opened
    recipe = make("run")
    train, dataset = TrainConfig.from_recipe(recipe), Dataset(Storage(recipe.dataset))
    job = LatentsJob(dataset, train, plan(train, dataset), recipe.resources)
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in dataset.manifest.shards:
        job.commit(unit := job.unit(entry), [apply(piece) for piece in job.prepare(unit)])
    ahead = TrainingData(dataset, train.data, 0, layer=None, latents=reader(job.storage, job.encoder))
    samples = [ahead.at(number) for number in range(6)]
    assert (samples[0].latent.dtype, samples[0].latent.shape) == (np.int16, (8, 8))
    images = family.prepare([data.at(number) for number in range(6)])
    tokens = family.prepare(samples)
    assert set(tokens) == {"ids", "mask", "tokens"}
    assert torch.equal(tokens["tokens"], family.stage.tokens(to_signed(images["pictures"])))
    draw = (torch.Generator().manual_seed(0) for _ in range(2))
    with torch.no_grad():
        first, second = (family.loss(family.model, batch, next(draw))[0] for batch in (images, tokens))
    assert float(first) == float(second)
    other = make("run", stage="dvae", data={"latents": job.encoder})
    with pytest.raises(RecipeError, match=r"train\.data\.latents: .* are of another autoencoder"):
        DalleFamily.make_assets(TrainConfig.from_recipe(other), data, tmp_path)


@pytest.mark.parametrize("stage", ["dvae", "vitvqgan"])
def test_it_learns_the_codes_of_each_first_stage(make: Make, stages: Any, stage: str) -> None:
    codec = open_first_stage(str(stages(stage)), "x")
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    ours = codec.images(codec.tokens(images))
    torch.testing.assert_close(ours, codec.model.vq(images).sample if stage == "dvae" else codec.vae(images))
    log = records(Path(fit(make(f"on-{stage}", 50, stage=stage, warmup=2))["run"]))
    assert log[-1]["image"] < log[0]["image"] - 0.2
    assert log[-1]["text"] < log[0]["text"] - 0.5


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "model.safetensors", tmp_path)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    after = Path(fit(make("started", 1, ema=None, init=str(run), lr=1e-12))["run"])
    from safetensors.torch import load_file

    before = load_file(run / "product" / "model.safetensors")
    for name, weight in load_file(after / "product" / "model.safetensors").items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("wider", 1, {"width": 32}, init=str(run)))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"width": 18}, r"train\.dalle: .*width 18 does not divide by 2 × heads"),
        ({"size": 8}, r"train\.dalle\.size: 8 pixels, and the first stage was trained on 16"),
        ({"first_stage": "/no/run"}, r"train\.dalle\.first_stage: no model at /no/run"),
        ({"sampling": {"candidates": 4}}, r"train\.dalle\.sampling: .*candidates 4 need clip"),
        ({"sampling": {"top_p": 2}}, r"train\.dalle\.sampling\.top_p"),
        ({"text_weight": 1}, r"train\.dalle\.text_weight"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        fit(make(f"wrong-{next(iter(section))}", 1, section))
    assert caught.value.exit_code == 2


def test_random_crops_and_stages_without_codes_are_refused(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"train\.dalle\.crop: tokens are precomputed"):
        TrainConfig.from_recipe(make("crops", 1, {"crop": "random"}, data={"latents": "auto"}))
    with pytest.raises(RecipeError, match=r"train\.dalle\.first_stage: .* of model: autoencoder, which has no codes"):
        fit(make("kl", 1, stage="autoencoder"))
