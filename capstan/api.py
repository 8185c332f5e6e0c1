"""The functions of the Python API: what the commands do, with values in place of files and exit codes.

Every function takes a `Recipe`, the path of a recipe file, or the recipe as a mapping. Mistakes raise `RecipeError`,
which names the field and the fix; other failures raise `CapstanError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capstan.cluster.recipe import load, loaded
from capstan.pipeline import extras
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage

if TYPE_CHECKING:
    from PIL import Image

    from capstan.open_dataset import OpenDataset
    from capstan.training.models.noise.schedulers import SamplerName

AnyRecipe = Recipe | Mapping[str, Any] | str | PathLike[str]


@dataclass(frozen=True)
class BuildSummary:
    """What a build or a selection left behind."""

    dataset: str  # folder or URL
    counts: dict[str, int]  # rows by outcome, and in all
    funnel: list[dict[str, Any]]  # {step, left, lost}: rows after each step
    failed: dict[str, int] = field(default_factory=dict)  # reason → rows, most frequent first
    quarantined: dict[str, str] = field(default_factory=dict)  # unit → why it could not be done
    licenses: dict[str, int] = field(default_factory=dict)  # SPDX expression → kept rows, where the source names any
    source: dict[str, int] = field(default_factory=dict)  # rows read, and repeats among them
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    retried: int | None = None  # rows, where `retry` was given

    @property
    def kept(self) -> int:
        """Number of samples in the dataset."""
        return self.counts.get("kept", 0)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(str(s['step']))}</td><td>{s['left']:,}</td></tr>" for s in self.funnel)
        failed = ", ".join(f"{escape(reason)}: {count:,}" for reason, count in self.failed.items())
        return (
            f"<p><b>{escape(self.dataset)}</b>: {self.kept:,} samples</p><table><tr><th>step</th><th>rows</th></tr>"
            f"{rows}</table>" + (f"<p>failed: {failed}</p>" if failed else "")
        )


def load_recipe(path: AnyRecipe, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Return the checked recipe of a YAML file or a mapping.

    `overrides` are `a.b=value` texts as in `--set`, or a mapping of such names to values. Raises RecipeError if any
    section is wrong.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{name}={_yaml(value)}" for name, value in overrides.items()]
    if isinstance(path, Recipe):
        return loaded(path.model_dump(mode="json", exclude_unset=True), overrides) if overrides else path
    if isinstance(path, Mapping):
        return loaded(dict(path), overrides)
    return load(Path(path), overrides)


def build(recipe: AnyRecipe, *, retry: str | None = None, progress: bool = True) -> BuildSummary:
    """Build the recipe's dataset, or complete it; a build that was stopped resumes.

    `retry` names reasons whose rows are fetched again ("failed", or "timeout,http_503"). Units that could not be done
    are in the summary's `quarantined`.
    """
    from capstan.pipeline.build import build as run

    return BuildSummary(**run(load_recipe(recipe), retry=retry, progress=progress))


def select(recipe: AnyRecipe, *, dry_run: bool = False, progress: bool = True) -> BuildSummary:
    """Decide again which staged rows are kept, by the recipe's conditions. With `dry_run` nothing is written."""
    from capstan.pipeline.build import select as run

    return BuildSummary(**run(load_recipe(recipe), dry_run=dry_run, progress=progress))


def recaption(recipe: AnyRecipe, *, plan: bool = False, progress: bool = True) -> dict[str, Any]:
    """Write or complete the recipe's caption layer and return its counts. With `plan` only count what is to be done."""
    extras.require(extras.RECAPTION, "recaption")
    from capstan.recaption.job import plan as planned
    from capstan.recaption.job import recaption as run

    ready = load_recipe(recipe)
    if ready.recaption is None:
        raise RecipeError("recaption", "is missing", "add a section recaption, e.g. recaption: {engine: coca, …}")
    return planned(ready) if plan else run(ready, progress=progress)


def train(recipe: AnyRecipe) -> dict[str, Any]:
    """Train the recipe's model, from its last checkpoint if there is one, and return the run's summary."""
    extras.require(extras.TRAIN, "train")
    from capstan.training.launch import train as run

    return run(load_recipe(recipe))


def sample(
    run: str | PathLike[str],
    prompts: str | Sequence[str] = (),
    *,
    seeds: Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerName | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 16,
) -> list[Image.Image]:
    """Draw one image per prompt, or one per seed for a single prompt.

    `run` is a run folder, a product or an exported pipeline. `size` is (width, height) in pixels. `steps`, `guidance`,
    `sampler` and `size` default to those of the run. A model that takes no prompts draws one image per seed.
    """
    extras.require(extras.TRAIN, "sample")
    from PIL import Image

    from capstan.training.sample import open_sampler, paired

    drawer = open_sampler(Path(run), sampler=sampler)
    given = [prompts] if isinstance(prompts, str) else prompts
    prompts, seeds = paired(given, seeds, prompted=drawer.prompted)
    drawn = drawer.draw(prompts, seeds, negative=negative, steps=steps, guidance=guidance, size=size, batch=batch)
    return [Image.fromarray(pixels) for pixels in drawn.arrays]


def report(dataset: str | PathLike[str], *, storage: Mapping[str, Any] | None = None) -> str:
    """Write report.html into the dataset's folder and return its path or URL."""
    from capstan.pipeline.report.report import write_report

    return write_report(_place(dataset, storage))


def verify(dataset: str | PathLike[str], *, storage: Mapping[str, Any] | None = None) -> list[str]:
    """Check every file, sum and index of a dataset and return the problems found; an empty list means it is whole."""
    from capstan.pipeline.pack.verify import verify as run

    return list(run(_place(dataset, storage), progress=False))


def open(dataset: str | PathLike[str], *, storage: Mapping[str, Any] | None = None) -> OpenDataset:
    """Open a finished dataset for reading: `out/ds` or `s3://bucket/ds`.

    `storage` holds fsspec options as in a recipe, e.g. {"endpoint_url": "http://127.0.0.1:9000"}. Raises RecipeError if
    there is no dataset.
    """
    from capstan.open_dataset import OpenDataset

    return OpenDataset(_place(dataset, storage))


def _place(dataset: str | PathLike[str], options: Mapping[str, Any] | None) -> Storage:
    place = Storage(str(dataset), options, field="dataset")
    place.check_reachable()
    return place


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
