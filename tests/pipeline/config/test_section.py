"""Mistakes in a recipe: the field by its dotted name, what is wrong, and a value that would be right."""

from __future__ import annotations

from typing import Any

import pytest

from capstan.pipeline.config import Recipe, validate
from capstan.pipeline.errors import RecipeError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": {"size": "large"}}, r"^image.size: .*found 'large'.*Fix: set e.g. size: 512$"),
    ({"image": {"resize": "stretch"}}, r"^image.resize: .*'center_crop'.*Fix: set e.g. resize: keep_ratio$"),
    ({"fetch": {"robots": "often"}}, r"^fetch.robots: .*Fix: set e.g. robots: true$"),
    ({"fetch": {"timeout_s": "1m"}}, r"^fetch.timeout_s: .*Fix: set e.g. timeout_s: 20.0$"),
    ({"fetch": {"retires": 1}}, r"^fetch.retires: unknown key. Fix: did you mean retries\?$"),
    ({"image": 5}, r"^image: .*Fix: set e.g. image: \{size: 512\}$"),
    ({"source": {"path": 3}}, r"^source.path: .*Fix: set e.g. path: urls.parquet$"),
    ({"resources": {"gpus": "all"}}, r"^resources.gpus: .*Fix: set e.g. gpus: 8$"),
    ({"select": {"a": 1}}, r"^select: .*Fix: set e.g. select: \[\{name: size\}\]$"),
    ({"select": [{"where": "true"}]}, r"^select.0.name: is missing. Fix: add it, e.g. name: size$"),
    ({"score": {"clip": "ViT"}}, r"^score.clip: .*Fix: set e.g. clip: \{model: ViT-B-32\}$"),
    ({"score": {"image": {"x": 1}}}, r"^score.image.x: unknown key. Fix: remove it; there are no keys here$"),
    ({"dedup": {"perceptual": 99}}, r"^dedup.perceptual: .*less than or equal to 16 \(found 99\)"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said.split(":")[0] for _, said in WRONG])
def test_a_mistake_names_the_field_and_a_value_that_is_right(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        validate(Recipe, {"dataset": "ds", **change})
