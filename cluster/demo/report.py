"""The demo's report.html: funnel, captions, loss curves, the grid, the measures"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.html import page, plots
from capstan.pipeline.html.page import Html
from capstan.pipeline.report.examples import choose
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.sections import failures, funnel
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import oracle
from capstan.pipeline.world.captions import compare, facts
from capstan.pipeline.world.table import scene_of_url
from capstan.recaption.store import read_layer

_SHOWN: Final = 12  # images with their captions
_COMPARED: Final = 1500  # captions compared with the truth
_RUNS: Final = ("captioner-base", "captioner", "autoencoder", "diffusion")


def write_demo_report(folder: Path, recipes: Mapping[str, Recipe]) -> Path:
    """Write report.html into the demo's folder and return its path."""
    web = recipes["web"]
    dataset = Dataset(Storage(web.dataset))
    assert web.source is not None
    world = web.source.world or WorldSource()
    layer = str((recipes["diffusion"].train or {})["data"]["layer"])
    made = page.Page(
        "Capstan demo",
        page.paragraph(
            "Captioned web images in, a text-to-image model out. Every stage below really ran, on images that "
            "Capstan draws itself, so each can be compared with the truth."
        ),
    )
    evaluation = json.loads((folder / "diffusion" / "evaluation.json").read_text())
    grid = (folder / "diffusion" / "evaluation.png").read_bytes()
    made.section(
        "Images drawn from prompts", page.note("No prompt was seen in training."), page.image(grid, "the grid")
    )
    made.section("How well images follow prompts", _followed(evaluation))
    made.section("From rows to images", *_funnel(dataset))
    made.section("Captions", *_captions(dataset, world, layer))
    made.section("Training", page.note("Loss by step."), page.grid(_curve(folder, run) for run in _RUNS))
    Storage(str(folder), field="DIR").write("report.html", made.html().encode())
    return folder / "report.html"


def _funnel(dataset: Dataset) -> list[Html]:
    """Return the funnel and the failures."""
    with Rows(dataset.storage) as rows:
        steps = funnel(dataset.manifest.funnel, rows.conditions)
        return [steps, page.heading("Failures"), *failures(rows, choose(rows))]


def _followed(evaluation: dict[str, Any]) -> Html:
    """Return the oracle's measures, with chance, the autoencoder's upper bound, and the oracle's own accuracy."""
    clean = evaluation["oracle"]
    rows = [
        [name.replace("_", " + "), entry["value"], entry["chance"], entry["ceiling"], clean.get(name)]
        for name, entry in evaluation["measures"].items()
    ]
    header = ["measure", "images", "chance", "through the autoencoder", "oracle on clean drawings"]
    remark = (
        f"{evaluation['scenes']} unseen descriptions, one image each. The oracle is a parser of drawings. Chance is "
        "the score of images of other scenes; a relation counts only if both objects are found."
    )
    return Html(page.note(remark) + page.table(header, rows))


def _captions(dataset: Dataset, world: WorldSource, layer: str) -> list[Html]:
    """Return original, short and descriptive captions side by side, and how often they are true."""
    shown: list[tuple[bytes, dict[str, str]]] = []
    originals, written = list[dict[str, float]](), list[dict[str, float]]()
    for shard in dataset.shard_names:
        table, captions = dataset.table(shard, ["key", "url", "caption"]), read_layer(dataset.storage, layer, shard)
        rows = table.to_pylist()
        for row in rows[: max(0, _COMPARED - len(written))]:
            scene = scene_of_url(world, row["url"])
            originals.append(compare(facts(row["caption"]), scene))
            # If no caption was good enough, the original is used instead.
            text = captions.get(row["key"], {}).get("descriptive", row["caption"])
            written.append(compare(facts(text), scene))
        wanted = range(min(len(rows), max(0, _SHOWN - len(shown))))
        for row, (key, jpeg) in zip(rows, dataset.read_images(shard, wanted), strict=False):
            texts = captions.get(key, {})
            slots = {slot: texts.get(slot, "(original used instead)") for slot in ("short", "descriptive")}
            shown.append((jpeg, {"original": row["caption"]} | slots))
    before, after = oracle.aggregate(originals), oracle.aggregate(written)
    table = page.table(["stated correctly", "original", "descriptive"], [[n, before[n], after[n]] for n in after])
    remark = f"Compared with the truth for {len(written):,} images; a caption that does not mention it counts as wrong."
    return [page.note(remark), table, page.cards(shown)]


def _curve(folder: Path, run: str) -> Html:
    """Return the curve of a run's loss by step."""
    records = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    return plots.curves(run, {"loss": (steps, [record["loss"] for record in records])})
