"""The demo's report.html: key figures, images and prompts, samples over steps, captions, curves, times, commands"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.html import page, plots
from capstan.pipeline.html.page import Cell, Html
from capstan.pipeline.report.examples import choose
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.sections import failures, funnel, steps_run
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import oracle
from capstan.pipeline.world.captions import compare, descriptive, facts, stated_words
from capstan.pipeline.world.scene import Scene
from capstan.pipeline.world.table import scene_of_url
from capstan.recaption.store import read_layer

_SHOWN: Final = 12  # images with their captions
_DRAWN: Final = 16  # images drawn from prompts; evaluation.png has as many
_COMPARED: Final = 1500  # captions compared with the truth
_RUNS: Final = ("captioner-base", "captioner", "autoencoder", "diffusion")
_GRID: Final = re.compile(r"samples/step-(\d+)\.png")
_MAIN: Final = "colour_shape"


def write_demo_report(folder: Path, recipes: Mapping[str, Recipe], times: Mapping[str, float]) -> Path:
    """Write report.html into the demo's folder and return its path; `times` has the seconds of each stage."""
    web = recipes["web"]
    dataset = Dataset(Storage(web.dataset))
    assert web.source is not None
    world = web.source.world or WorldSource()
    train = recipes["diffusion"].train or {}
    evaluation = json.loads((folder / "diffusion" / "evaluation.json").read_text())
    made = page.Page(
        "Capstan demo",
        page.paragraph(
            "Captioned web images in, a text-to-image model out. Every stage below really ran, on images that "
            "Capstan draws itself, so each can be compared with the truth."
        ),
        _figures(dataset, evaluation, times),
    )
    prompts = _prompts(world, evaluation["scenes"])
    samples = int(train["watch"]["samples"]["count"])
    made.section("Images drawn from prompts", *_drawn(folder, prompts[:_DRAWN], web.image.size))
    made.section("Samples over steps", *_over_steps(folder, _prompts(world, samples), web.image.size))
    made.section("How well images follow prompts", _followed(evaluation))
    made.section("From rows to images", *_funnel(dataset))
    made.section("Captions", *_captions(dataset, world, str(train["data"]["layer"])))
    made.section("Training", page.note("Loss by step, on a logarithmic scale."), page.grid(_curves(folder)))
    made.section("Time of each stage", page.table(["stage", "seconds"], [[name, s] for name, s in times.items()]))
    made.section("What to do next", *_next(folder, web.dataset))
    Storage(str(folder), field="DIR").write("report.html", made.html().encode())
    return folder / "report.html"


def _figures(dataset: Dataset, evaluation: Mapping[str, Any], times: Mapping[str, float]) -> Html:
    counts, value = dataset.manifest.counts, evaluation["measures"][_MAIN]["value"]
    shown = {"Rows": f"{counts['rows']:,}", "Images kept": f"{counts['kept']:,}"}
    shown[f"Right in {oracle.title(_MAIN)}"] = "–" if value is None else f"{value:.0%}"
    return page.figures(shown | {"Prompts": f"{evaluation['scenes']:,}", "Minutes": f"{sum(times.values()) / 60:.1f}"})


def _prompts(world: WorldSource, count: int) -> list[str]:
    """Return the prompts of unseen scenes, in the order in which they are drawn."""
    from capstan.training.metrics.samples import Scenes

    return Scenes(world, count).prompts(range(count))


def _drawn(folder: Path, prompts: Sequence[str], side: int) -> Iterator[Html]:
    """Yield each image with its prompt as text."""
    yield page.note("No prompt was seen in training.")
    images = _cut((folder / "diffusion" / "evaluation.png").read_bytes(), prompts, side)
    yield page.gallery((page.strip([(image, "")], prompt) for prompt, image in zip(prompts, images, strict=True)))


def _over_steps(folder: Path, prompts: Sequence[str], side: int) -> Iterator[Html]:
    """Yield the same prompts with the same noise after more and more steps."""
    run = Storage(str(folder / "diffusion"))
    steps = {int(found[1]): name for name in run.names("samples") if (found := _GRID.fullmatch(name))}
    grids = {step: _cut(run.read(name), prompts, side) for step, name in sorted(steps.items())}
    yield page.note("The same prompts and the same noise, while the model trains.")
    strips = [
        page.strip([(grid[number], f"step {step:,}") for step, grid in grids.items()], prompt)
        for number, prompt in enumerate(prompts)
    ]
    yield page.gallery(strips, wide=True)


def _cut(sheet: bytes, prompts: Sequence[str], side: int) -> list[bytes]:
    """Return the PNGs of a grid's images."""
    from capstan.training.drawing.grid import cut

    made = []
    with Image.open(io.BytesIO(sheet)) as opened:
        cells = cut(opened.convert("RGB"), prompts, side)
    assert cells, "the grid shows other prompts"
    for cell in cells:
        file = io.BytesIO()
        cell.save(file, "PNG", optimize=True)
        made.append(file.getvalue())
    return made


def _funnel(dataset: Dataset) -> list[Html]:
    """Return the funnel and the failures."""
    with Rows(dataset.storage) as rows:
        steps = funnel(steps_run(dataset.manifest), rows.conditions)
        return [steps, page.heading("Failures"), *failures(rows, choose(rows))]


def _followed(evaluation: dict[str, Any]) -> Html:
    """Return the oracle's measures, with chance, the autoencoder's upper bound, and the oracle's own accuracy."""
    clean = evaluation["oracle"]
    rows = [
        [oracle.title(name), entry["value"], entry["chance"], entry["ceiling"], clean.get(name)]
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
    shown: list[tuple[bytes, dict[str, str | Cell]]] = []
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
            texts = {"original": row["caption"]} | {
                slot: captions.get(key, {}).get(slot, "(original used instead)") for slot in ("short", "descriptive")
            }
            scene = scene_of_url(world, row["url"])
            shown.append((jpeg, {slot: Cell(page.marked(text, _wrong(text, scene))) for slot, text in texts.items()}))
    before, after = oracle.aggregate(originals), oracle.aggregate(written)
    rates = [[oracle.title(name), before[name], after[name]] for name in after]
    table = page.table(["stated correctly", "original", "descriptive"], rates)
    remark = f"Compared with the truth for {len(written):,} images; a caption that does not mention it counts as wrong."
    marks = "Colours, shapes, sizes, numbers and places that the true description does not have are marked."
    return [page.note(remark), table, page.note(marks), page.cards(shown)]


def _wrong(text: str, scene: Scene) -> frozenset[str]:
    """Return the words of a caption that state something about a scene which its true description does not."""
    return stated_words(text) - stated_words(descriptive(scene))


def _curves(folder: Path) -> Iterator[Html]:
    """Yield the curve of each run's loss by step."""
    for run in _RUNS:
        records = [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]
        losses = [record["loss"] for record in records]
        line = ([record["step"] for record in records], losses)
        yield plots.curves(run, {"loss": line}, logarithmic=min(losses) > 0)


def _next(folder: Path, dataset: str) -> list[Html]:
    place = shlex.quote(str(folder))
    return [
        page.note("Look at rows, captions and runs; draw your own prompts; change a recipe and train again."),
        page.commands(
            f"capstan view {shlex.quote(dataset)}",
            f"capstan view {place}",
            f'capstan sample {place}/diffusion -p "a red circle and a blue square" -o grid.png',
            f"capstan train {place}/recipes/diffusion.yaml --set train.run={place}/longer --set train.steps=6000",
        ),
        page.note("Then your own images: docs/first-dataset.md."),
    ]
