"""Drawing with dalle: the cache, seeds, choices of tokens, CLIP's choice, and exports that draw the same elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import warm_python
from tiny_towers import save_open_clip

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import ClipModel
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.dalle.drawer import DalleDrawer
from capstan.training.models.dalle.sampling import Choice, draw_tokens
from capstan.training.models.dalle.tokens import emptied, prompt_ids
from capstan.training.sample import open_sampler
from capstan.training.trainer import fit

PROMPTS = ["a red square", "a blue square, number 7", "green"]


@pytest.fixture
def drawer(run: Path) -> DalleDrawer:
    return open_sampler(run, "cpu")


def tokens_of(
    drawer: DalleDrawer, how: Choice, seeds: list[int], prompts: list[str] = PROMPTS, count: int = 64
) -> torch.Tensor:
    ids, mask = prompt_ids(drawer.tokenizer, prompts, drawer.length)
    with torch.no_grad():
        return draw_tokens(drawer.model, (ids, mask, emptied(ids, drawer.tokenizer)), count, seeds, how)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tokens_are_those_of_the_whole_sequence_without_a_cache(drawer: DalleDrawer, guidance: float) -> None:
    tokens = tokens_of(drawer, Choice(guidance=guidance, top_k=1), [0, 1, 2])
    ids, mask = prompt_ids(drawer.tokenizer, PROMPTS, drawer.length)
    with torch.no_grad():
        logits = drawer.model(ids, mask, tokens).image
        without = drawer.model(emptied(ids, drawer.tokenizer), mask, tokens).image
    assert torch.equal((without + guidance * (logits - without)).argmax(-1), tokens)


def test_an_image_is_that_of_its_seed_whatever_else_is_drawn(drawer: DalleDrawer) -> None:
    together = drawer.draw(PROMPTS, [3, 4, 5]).arrays
    assert together.shape == (3, 16, 16, 3)
    for row, seed in enumerate([3, 4, 5]):
        np.testing.assert_array_equal(drawer.draw([PROMPTS[row]], [seed]).arrays[0], together[row])
    assert (drawer.draw(PROMPTS, [6, 7, 8]).arrays != together).any()
    np.testing.assert_array_equal(drawer.draw(PROMPTS, [3, 4, 5], batch=2).arrays, together)


def test_tokens_are_drawn_from_the_likeliest(drawer: DalleDrawer) -> None:
    every, few = (
        tokens_of(drawer, Choice(**how), list(range(40)), ["a"] * 40, 1)[:, 0].tolist() for how in ({}, {"top_k": 3})
    )
    assert len(set(few)) <= 3 < len(set(every))
    narrow = set(tokens_of(drawer, Choice(top_p=0.05), list(range(40)), ["a"] * 40, 1)[:, 0].tolist())
    assert len(narrow) < len(set(every))
    cold = set(tokens_of(drawer, Choice(temperature=0.001), list(range(10)), ["a"] * 10, 1)[:, 0].tolist())
    assert len(cold) == 1


def test_the_recipe_has_defaults_and_options_it_has_not_are_refused(drawer: DalleDrawer) -> None:
    assert drawer.settings() == {"guidance": 1.5, "temperature": 1.0, "candidates": 1}
    assert drawer.settings(guidance=4.0)["guidance"] == 4.0
    for option in ({"steps": 5}, {"negative": "blurry"}, {"size": (32, 32)}):
        with pytest.raises(RecipeError, match=f"--{next(iter(option))}: this model has no such setting"):
            drawer.draw(["a"], [0], **option)


def test_of_several_candidates_the_one_that_clip_prefers_is_drawn(make: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    clip = save_open_clip(tmp_path / "clip")
    run = fit(make("candidates", 1, {"sampling": {"candidates": 3, "clip": {"model": clip}}}))["run"]
    drawer = open_sampler(run, "cpu")
    best = drawer.draw(PROMPTS, [0, 1, 2]).arrays
    drawer.sampling = drawer.sampling.model_copy(update={"candidates": 1, "clip": None})
    first = drawer.draw(PROMPTS, [0, 1, 2]).arrays
    tower = ClipModel(clip, None, "fp32", "x")
    loaded = tower.load("cpu", threads=1)

    def score(images: np.ndarray) -> torch.Tensor:
        features = loaded.images(np.stack([tower.prepare(image) for image in images]))
        return torch.nn.functional.cosine_similarity(features, loaded.texts(PROMPTS))

    assert (score(best) >= score(first)).all()
    assert (score(best) > score(first)).any()


def test_it_is_measured_beside_its_first_stage(run: Path) -> None:
    result = evaluate(run, count=4, world=WorldSource(scenes=10, size=16))
    assert result["kind"] == "dalle"
    assert {"value", "chance", "ceiling"} <= set(result["measures"]["background"])


CODE = """
import sys, json, numpy as np, torch
from transformers import CLIPTokenizer, JanusForConditionalGeneration
torch.set_num_threads(1)
model = JanusForConditionalGeneration.from_pretrained(sys.argv[1])
tokenizer = CLIPTokenizer.from_pretrained(sys.argv[1])
made = []
for prompt, seed in json.loads(sys.argv[3]):
    torch.manual_seed(seed)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), generation_mode="image")
    made.append(model.decode_image_tokens(tokens)[0])
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
images = ((torch.stack(made).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
np.save(sys.argv[2], images.numpy())
"""


@pytest.mark.parametrize("stage", ["vqgan", "dvae"])
def test_janus_draws_the_same_without_capstan(make: Callable[..., Recipe], stage: str, tmp_path: Path) -> None:
    sampling = {"guidance": 2.0, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
    run = fit(make(f"export-{stage}", 3, {"sampling": sampling}, stage=stage))["run"]
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "JanusForConditionalGeneration"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    asked = json.dumps(list(zip(PROMPTS, [0, 1, 2], strict=True)))
    command = [sys.executable, "-c", CODE, str(folder), str(tmp_path / "made.npy"), asked]
    warm_python.run(command, check=True, cwd=tmp_path, env=environment, timeout=500)
    ours = open_sampler(run, "cpu").draw(PROMPTS, [0, 1, 2]).arrays.astype(int)
    assert np.abs(np.load(tmp_path / "made.npy").astype(int) - ours).max() <= 1
    assert len(np.unique(ours[0].reshape(-1, 3), axis=0)) > 4
    with pytest.raises(RecipeError, match=r"RUN: .* is an export, which transformers draws with"):
        open_sampler(folder, "cpu")


def test_what_janus_cannot_decode_is_refused(make: Callable[..., Recipe], run: Path, tmp_path: Path) -> None:
    vit = fit(make("vit", 1, stage="vitvqgan"))["run"]
    with pytest.raises(RecipeError, match=r"RUN: .* draws with a ViTVQModel, and Janus with a VQModel alone"):
        export(vit, tmp_path / "vit")
    product = tmp_path / "product"
    shutil.copytree(run / "product", product)
    config = product / "first_stage" / "config.json"
    config.write_text(config.read_text().replace('"norm_type": "group"', '"norm_type": "spatial"'))
    with pytest.raises(RecipeError):
        export(product, tmp_path / "spatial")
    with pytest.raises(RecipeError, match="--sampler: this model has no such setting"):
        export(run, tmp_path / "sampler", sampler="ddim")
