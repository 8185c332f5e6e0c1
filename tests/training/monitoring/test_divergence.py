"""When a run counts as ill: not for one high loss, not for losses that fall, and the same after a resume."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError
from capstan.training.config import Diverged
from capstan.training.monitoring.divergence import Divergence
from capstan.training.trainer import fit


def test_a_loss_that_stays_high_diverges_and_one_that_visits_does_not() -> None:
    watched = Divergence(Diverged(factor=4, steps=5))
    rng = random.Random(0)
    for step in range(290):  # falls by eighty times, with noise, and spikes of up to four steps
        high = 50.0 if step % 50 > 45 else 1.0
        assert not watched.add(rng.uniform(0.5, 1.5) * 0.985**step * high)
    answers = [watched.add(1.0) for _ in range(5)]
    assert answers == [False] * 4 + [True]


def test_nothing_is_said_too_early_nor_of_losses_that_may_be_negative() -> None:
    early = Divergence(Diverged(factor=2, steps=1))
    assert not any(early.add(loss) for loss in [1.0] * 10 + [99.0])
    negative = Divergence(Diverged(factor=2, steps=1))
    assert not any(negative.add(loss) for loss in [-1.0] * 40 + [99.0])
    off = Divergence(None)
    assert not any(off.add(loss) for loss in [1.0] * 40 + [99.0] * 99)


@pytest.mark.parametrize("at", [10, 30, 42])
def test_a_resumed_run_judges_as_if_it_had_not_stopped(at: int) -> None:
    losses = [1.0] * 40 + [9.0] * 5
    whole, first, second = (Divergence(Diverged(factor=3, steps=4)) for _ in range(3))
    expected = [whole.add(loss) for loss in losses]
    answers = [first.add(loss) for loss in losses[:at]]
    second.restore(first.state())
    assert answers + [second.add(loss) for loss in losses[at:]] == expected
    assert expected.index(True) == 43


def test_a_run_that_is_not_finite_names_the_part_that_made_it(
    recipe: Callable[..., Recipe], autoencoder: Path, tmp_path: Path
) -> None:
    """Among them the first in order: all that come after it compute with its output."""
    broken = tmp_path / "ae" / "product"
    shutil.copytree(autoencoder / "product", broken)
    vae = AutoencoderKL.from_pretrained(broken)
    with torch.no_grad():
        vae.encoder.conv_in.bias.fill_(float("nan"))
    vae.save_pretrained(broken)
    of_recipe = recipe().train
    assert of_recipe is not None
    with pytest.raises(CapstanError, match=r"not finite at step 0: the autoencoder \(train\.diffusion\.autoencoder\)"):
        fit(recipe("broken", diffusion=of_recipe["diffusion"] | {"autoencoder": str(broken.parent)}))
    (file,) = (tmp_path / "broken").glob("bad-step-*.json")
    assert [part.split(" (")[0] for part in json.loads(file.read_text())["not_finite"]] == [
        "the autoencoder",
        "the network",
    ]
