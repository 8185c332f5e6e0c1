"""A run that starts on captions longer than its text encoder reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from capstan.pipeline.config import Recipe
from capstan.training.trainer import fit


def test_a_run_says_at_its_start_how_much_of_its_captions_is_cut(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    of_recipe = recipe().train
    assert of_recipe is not None
    diffusion = of_recipe["diffusion"]
    for length in (4, 24):
        fit(recipe(f"run{length}", steps=1, diffusion=diffusion | {"text": diffusion["text"] | {"length": length}}))
    short, long = ((tmp_path / f"run{length}" / "train.log").read_text() for length in (4, 24))
    found = re.search(r"(\d+)% of captions are longer than the 4 tokens .* lose their last (\d+) on average", short)
    assert found is not None
    assert int(found[1]) == 100
    assert int(found[2]) > 2
    assert "raise train.diffusion.text.length in a new run" in short
    assert "are longer than" not in long
