"""`capstan experiment world`: the caption experiment from scratch, on drawn images

The demo's own stages make images, captioner, captions, autoencoder and latents. Then a CLIP is trained that only
evaluates, and `capstan experiment blend` trains and evaluates the arms. Every stage resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from capstan.cluster.demo import recipes
from capstan.cluster.demo.demo import Demo, Stage, run_stages, true_captions
from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer
from capstan.training.experiment.config import MAIN, TRUTH

# Three arms and an upper bound × three seeds: about an hour and a half on two idle cores, after twenty minutes for the
# stages before them.
STEPS: Final = [750, 1500, 2250, 3000]
SEEDS: Final = [0, 1, 2]
PROMPTS: Final = 192


def run_experiment(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the stages that are not done yet. Return the findings and the path of the report."""
    from capstan.training.experiment.run import run_blend

    world = _World(folder, quick)
    run_stages(folder, world.stages, "experiment.log")
    return run_blend(world.recipe())


class _World:
    """The demo's stages up to the latents, and those that only the experiment needs."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.demo = folder, Demo(folder, quick)
        self.demo.recipes |= experiment_recipes(folder, self.demo.recipes, quick=quick)
        stages = dict(self.demo.stages)
        before = list(stages)[: list(stages).index("train the diffusion model")]
        at = before.index("recaption the web's images")
        self.stages: list[Stage] = [
            *((title, stages[title]) for title in before[:at]),
            ("write true captions", self._truth),  # before the captioner's layer, which is then the latest
            *((title, stages[title]) for title in before[at:]),
            ("train the CLIP that evaluates", lambda: self.demo.train("scorer")),
        ]

    def recipe(self) -> Recipe:
        """Return the experiment's recipe, with the layer and the latents that the stages made."""
        self.demo.recipes["experiment"]["train"]["data"] = self.demo.recipes["diffusion"]["train"]["data"]
        return self.demo.recipe("experiment")

    def _truth(self) -> dict[str, Any]:
        web = self.demo.recipe("web")
        written = write_given_layer(Storage(web.dataset), TRUTH, true_captions(web))
        return {"outcome": f"{written['images']:,} images"}


def experiment_recipes(folder: Path, demo: dict[str, dict[str, Any]], *, quick: bool) -> dict[str, dict[str, Any]]:
    """Return the recipes that the demo does not have, on its datasets."""
    web = {key: value for key, value in demo["web"].items() if key != "train"}
    labelled = {key: value for key, value in demo["labelled"].items() if key != "train"}
    blends = {"arms": [*MAIN, "truth95"], "seeds": SEEDS, "steps": STEPS, "prompts": PROMPTS}
    made = {
        "scorer": labelled | {"train": scorer(folder, demo["captioner-base"]["train"])},
        "experiment": web
        | {"train": arm(folder)}
        | {"experiment": {**blends, "scorer": {"model": str(folder / "scorer" / "product")}, "upsampler": "captions"}},
    }
    if quick:
        made["scorer"]["train"] |= {"steps": 6, "log_every": 1}
        made["experiment"]["train"] |= {"steps": 4, "log_every": 1, "checkpoint": {"every": 2}}
        made["experiment"]["experiment"] |= {"seeds": [0, 1], "steps": [2, 4], "prompts": 8, "draws": 200}
    return made


def scorer(folder: Path, base: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a CLIP on labelled images, trained by the captioner family's contrastive loss alone.

    It has the captioner's architecture, but shares neither its weights nor its loss.
    """
    return base | {
        "run": str(folder / "scorer"),
        "seed": 7,
        "steps": 600,
        "batch": 128,
        "lr": 2e-3,
        "warmup": 50,
        "ema": 0.99,
        "data": {"layer": recipes.LABELLED_LAYER, "blend": {"short": 0.5, "descriptive": 0.5}},
        "captioner": {**base["captioner"], "contrastive": 1.0, "caption": 0.0},
        "checkpoint": {"every": 300},
    }


def arm(folder: Path) -> dict[str, Any]:
    """Return the section of the demo's diffusion model at a constant rate, so that any step can be the last.

    One process of one thread: two arms then share two cores, and neither waits for the other.
    """
    train = recipes.diffusion(folder)
    return train | {
        "run": str(folder / "experiment"),
        "steps": STEPS[-1],
        "lr": 1.5e-3,
        "schedule": "constant",
        "ema": 0.998,
        "log_every": 50,
        "engine": {"strategy": "ddp", "workers": 1, "threads": 1, "launcher": "local"},
        "checkpoint": {"every": 500, "keep": 1},
    }
