"""The demo's page, over a dataset of the captioned world and files as the other stages leave them."""

from __future__ import annotations

import json
from pathlib import Path

import browser
import numpy as np
import pytest
from in_process import run_all_here
from PIL import Image

from capstan.cluster.demo import recipes
from capstan.cluster.demo.report import write_demo_report
from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import descriptive, short
from capstan.pipeline.world.oracle import MEASURES
from capstan.pipeline.world.table import scene_of_url
from capstan.recaption.store import write_given_layer
from capstan.training.drawing.grid import grid
from capstan.training.metrics.samples import Scenes

pytestmark = pytest.mark.integration

SCENES = 16
STAGES = {"build the web's images": 12.3, "train the diffusion model": 66.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    made = recipes.recipes(folder, quick=True)
    web = Recipe.model_validate(made["web"])
    with pytest.MonkeyPatch.context() as patch:
        for module in ("build", "pack.job"):
            patch.setattr(f"capstan.pipeline.{module}.run", run_all_here)
        build(web, progress=False)
    assert web.source is not None
    world = web.source.world or WorldSource()
    dataset, captions = Dataset(Storage(web.dataset)), dict[str, dict[str, str]]()
    for shard in dataset.shard_names:
        for row in dataset.table(shard, ["key", "url"]).to_pylist():
            scene = scene_of_url(world, row["url"])
            captions[row["key"]] = {"short": f"{short(scene)}, no triangle", "descriptive": descriptive(scene)}
    write_given_layer(Storage(web.dataset), "written", captions)
    made["diffusion"]["train"]["data"] = {"layer": "written"}
    for run in ("captioner-base", "captioner", "autoencoder", "diffusion"):
        (folder / run).mkdir()
        lines = [json.dumps({"step": step, "loss": 3.0 / step}) for step in range(1, 7)]
        (folder / run / "log.jsonl").write_text("\n".join(lines))
    (folder / "diffusion" / "samples").mkdir()
    _draw(folder / "diffusion" / "evaluation.png", Scenes(world, SCENES))
    for step in (3, 6):
        _draw(folder / "diffusion" / "samples" / f"step-{step:06d}.png", Scenes(world, recipes.SHOWN))
    measures = {name: {"value": 0.5, "chance": 0.1, "ceiling": 0.9} for name in MEASURES}
    evaluation = {"scenes": SCENES, "measures": measures, "oracle": dict.fromkeys(MEASURES, 1.0)}
    (folder / "diffusion" / "evaluation.json").write_text(json.dumps(evaluation))
    return write_demo_report(folder, {name: Recipe.model_validate(one) for name, one in made.items()}, STAGES)


def _draw(file: Path, scenes: Scenes) -> None:
    numbers = range(len(scenes))
    grid(np.asarray(scenes.images(numbers, 32)), scenes.prompts(numbers)).save(file)


def test_prompts_are_text_and_measures_have_one_name(report: Path) -> None:
    text = report.read_text()
    world = WorldSource.model_validate({**recipes.WORLD, "scenes": 200})
    for prompt in Scenes(world, SCENES).prompts(range(SCENES)):
        assert text.count(f"<figcaption><bdi>{prompt}</bdi>") >= 1
    assert "colour_shape" not in text
    assert text.count("colour + shape") == 3  # a key figure, the images, the captions
    assert text.index("Images kept") < text.index("<h2>")
    assert "step 3" in text
    assert "step 6" in text
    assert "near duplicates" not in text  # `perceptual: null`: the search did not run
    assert all(name in text.replace("&#x27;", "'") and f"{seconds:.3f}" in text for name, seconds in STAGES.items())
    assert "capstan view " in text
    assert "<script" not in text


def test_what_is_wrong_in_a_caption_is_marked(report: Path) -> None:
    marked = report.read_text().split("<mark>")[1:]
    words = {part.partition("</mark>")[0] for part in marked}
    assert "no" in words
    assert "triangle" in words
    assert "and" not in words


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_is_read_on_phones_and_wide_screens(report: Path, width: int, dark: bool) -> None:
    binary = browser.find()
    assert binary is not None
    with browser.start(binary) as chromium:
        visit = chromium.visit(
            report,
            "document.documentElement.scrollWidth <= innerWidth",
            "scrollTo(0, 2000); new Promise(done => setTimeout(done, 100))",
            "document.querySelector('nav').getBoundingClientRect().top",
            "[...document.images].every(image => image.naturalWidth > 0)",
            width=width,
            dark=dark,
        )
    assert visit.answers[0] is True
    assert (visit.answers[2] == 0) == (width < 700)  # the sections stay in reach on a phone
    assert visit.answers[3] is True
    assert visit.problems == []


def test_the_page_says_what_its_images_are(report: Path) -> None:
    with Image.open(report.parent / "diffusion" / "evaluation.png") as sheet:
        assert sheet.width > 4 * 96  # the grid itself stays as it was
    assert 'alt="a ' in report.read_text() or 'alt="on a ' in report.read_text()
