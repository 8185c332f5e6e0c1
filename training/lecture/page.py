"""Results of a lecture → index.html (self-contained), results.json, and strip.png"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from capstan.pipeline.html import interval_plots, page
from capstan.pipeline.html.page import Cell, Html
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import oracle
from capstan.training.experiment.contact_sheet import side_by_side
from capstan.training.experiment.intervals import Interval
from capstan.training.experiment.measure import SHOWN, Measurements
from capstan.training.experiment.prompts import Prompt
from capstan.training.lecture import media
from capstan.training.lecture.config import LectureConfig
from capstan.training.lecture.measure import SHOWN_SET
from capstan.training.lecture.results import MEASURES, PRIMARY, Found, sentence

PAGE: Final = "index.html"
_STRIP: Final = 3  # prompts in strip.png
_PLAYED: Final = "Finished runs, which had time and data of their own. All prompts are shown, none chosen."
_MEANS: Final = {
    "colour_shape": "share of the prompt's coloured shapes that are in the image",
    "count": "whether the number of things is right",
    "relation": "whether both things are there and lie as stated",
    "background": "whether the background is right",
    "size": "of the things that are there, the share with the right size",
    "followed_strict": "share of all that the prompt states; each thing too many counts as one more failed statement",
}


def write_page(
    storage: Storage, config: LectureConfig, done: Sequence[Found], prompts: Sequence[Prompt], images: Measurements
) -> str:
    """Publish results.json, strip.png and, last, the page; return its path."""
    results: dict[str, Any] = {name: getattr(config, name) for name in ("minutes", "clock", "prompts", "seeds")}
    results["systems"] = [one.facts() for one in done]
    storage.write("results.json", json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n")
    drawn = {one.system.name: images.images(f"{one.system.name}-s{one.seeds[0]}", SHOWN_SET) for one in done}
    generators = [one for one in done if not one.is_first_stage]
    if generators:
        storage.write("strip.png", _strip(prompts, {one.system.name: drawn[one.system.name] for one in generators}))
    made = _page(config, done, prompts, drawn)
    if played := list(media.rows(storage, config.media)):
        made.section("Moving pictures and sound", page.note(_PLAYED), *played)
    storage.write(PAGE, made.html().encode())
    return f"{storage.url}/{PAGE}"


def _page(
    config: LectureConfig, done: Sequence[Found], prompts: Sequence[Prompt], drawn: dict[str, list[np.ndarray]]
) -> page.Page:
    kind = "processor" if config.clock == "cpu" else "clock"
    generators, stages = ([one for one in done if one.is_first_stage is first] for first in (False, True))
    made = page.Page(
        "The same prompts, drawn by every system",
        page.paragraph(
            "Each system is trained from random weights on the same images and captions for the same time. Then all "
            "draw descriptions of scenes that nobody has trained on, with the same seeds. An oracle without learned "
            "parts says what is in each image."
        ),
        page.figures(
            {
                "systems": str(len(done)),
                f"minutes each ({kind})": f"{config.minutes:g}",
                "prompts": str(config.prompts),
                "training seeds": str(len(config.seeds)),
            }
        ),
        page.commands(config.command),
    )
    if not done:
        made.section("Nothing yet", page.note("No system is finished."))
        return made
    if generators:
        made.section("What they draw", *_sheet(generators, prompts, drawn))
        made.section("What is right in it", *_measures(generators))
        made.section("Against minutes", *_curves(generators))
    if stages:
        made.section("First stages", *_stages(stages, prompts, drawn))
    made.section("Cost", *_cost(done))
    made.section("The papers", *_papers(done))
    made.section("How it is measured", *_method(config))
    return made


# Sections ------------------------------------------------------------------------------------------------------------


def _sheet(found: Sequence[Found], prompts: Sequence[Prompt], drawn: dict[str, list[np.ndarray]]) -> Iterable[Html]:
    yield page.note("The first prompts, none chosen. Left: the scene that the prompt describes.")
    names = [one.system.name for one in found]
    rows = []
    for number, prompt in enumerate(prompts[:SHOWN]):
        made = [(name, drawn[name][number]) for name in names if number < len(drawn[name])]
        shown = [page.frame(_png(image), f"{name}: {prompt.text}") for name, image in made]
        assert prompt.image is not None
        rows.append((prompt.text, [page.frame(_png(prompt.image), f"the scene: {prompt.text}"), *shown]))
    yield page.sheet(["the scene", *names], rows)


def _measures(found: Sequence[Found]) -> Iterable[Html]:
    yield page.note(
        "Mean over prompts and seeds [95% interval]. Below: chance, which is the same images compared with other "
        "prompts, and the ceiling, which is the true images as the system's first stage decodes them."
    )
    rows = []
    for one in sorted(found, key=lambda one: -one.values[PRIMARY].mean):
        cells = [Cell(_cell(one.values[name], one.chance.get(name), one.ceiling.get(name))) for name in MEASURES]
        rows.append([one.system.name, *cells])
    yield page.table(["system", *map(oracle.title, MEASURES)], rows)
    plots = []
    for name in MEASURES:
        values = [(one.system.name, one.values[name]) for one in found if math.isfinite(one.values[name].mean)]
        if values:
            lines = [(label, value.mean, value.low, value.high) for label, value in values]
            plots.append(interval_plots.forest(oracle.title(name), lines))
    yield page.grid(plots)
    yield page.table(["measure", "definition"], [[oracle.title(name), _MEANS[name]] for name in MEASURES])


def _cell(value: Interval, chance: float | None, ceiling: float | None) -> Html:
    text = _number(value)
    beside = f"chance {_short(chance)}, ceiling {_short(ceiling)}"
    return Html(f"{page.escape(text)}<small>{page.escape(beside)}</small>")


def _curves(found: Sequence[Found]) -> Iterable[Html]:
    names = [one.system.name for one in found]
    yield interval_plots.key(names)
    yield page.note("By minutes of training, those of first stages included. Bands are 95% intervals, cut at 0 and 1.")
    yield page.grid(
        interval_plots.bands(
            oracle.title(measure),
            {
                one.system.name: [
                    (x, value.mean, *np.clip((value.low, value.high), 0, 1).tolist())
                    for x, value in one.curves[measure]
                ]
                for one in found
            },
        )
        for measure in MEASURES
    )


def _stages(found: Sequence[Found], prompts: Sequence[Prompt], drawn: dict[str, list[np.ndarray]]) -> Iterable[Html]:
    yield page.note("True images, encoded and decoded. A system on latents or tokens draws no better than this.")
    names = [one.system.name for one in found]
    rows = []
    for number, prompt in enumerate(prompts[:SHOWN]):
        shown = [page.frame(_png(drawn[name][number]), f"{name}: {prompt.text}") for name in names]
        assert prompt.image is not None
        rows.append((prompt.text, [page.frame(_png(prompt.image), f"the scene: {prompt.text}"), *shown]))
    yield page.sheet(["the scene", *names], rows)
    yield page.table(
        ["system", "PSNR, dB", *map(oracle.title, MEASURES)],
        [
            [one.system.name, f"{one.values['psnr'].mean:.2f}", *(_number(one.values[m]) for m in MEASURES)]
            for one in found
        ],
    )


def _cost(found: Sequence[Found]) -> Iterable[Html]:
    rows = [
        [one.system.name, one.parameters, one.steps, one.cpu_minutes, one.wall_minutes, one.seconds_per_image]
        for one in found
    ]
    header = ["system", "parameters", "steps of the last run", "processor minutes", "clock minutes", "seconds an image"]
    yield page.table(header, rows)
    yield page.note(
        "Minutes are those of the training steps, read from each run's log, without start-up, saving and drawing. "
        "Parameters count everything that drawing needs. Seconds an image are clock time, in batches of 32, on the "
        "machine as it was; other work on it makes them larger."
    )


def _papers(found: Sequence[Found]) -> Iterable[Html]:
    rows = [[one.system.name, one.system.paper or "–", one.system.claim or "–", sentence(one)] for one in found]
    yield page.table(["system", "paper", "what it claims", "what is seen here"], rows)
    yield page.note(
        "Papers train for weeks on photographs. A few minutes on drawn scenes say how soon a method binds words to "
        "things, not how well its images look in the end."
    )


def _method(config: LectureConfig) -> Iterable[Html]:
    yield page.paragraph(
        "Prompts are true descriptions of scenes drawn from a seed that no dataset uses. Each prompt has a fixed seed "
        "of noise. Weights are averaged as each recipe says. Learning rates are constant, so that every point could "
        "be the last. Recipes were tuned by hand on small runs, some more than others: the order of two systems that "
        "are close says little."
    )
    yield page.note("An interval of a share that is 0 or 1 for every prompt has no width, and says little.")
    if len(config.seeds) == 1:
        yield page.note("One training seed: the intervals are over prompts alone, and another seed may lie outside.")


# Images and numbers --------------------------------------------------------------------------------------------------


def _strip(prompts: Sequence[Prompt], drawn: dict[str, list[np.ndarray]]) -> bytes:
    """Return a PNG of a few prompts by each system, next to their scenes."""
    rows = []
    for number in range(min(_STRIP, len(prompts), *map(len, drawn.values()))):
        columns = {"the scene": prompts[number].image} | {name: images[number] for name, images in drawn.items()}
        rows.append((prompts[number].text, columns))
    return side_by_side(rows)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _number(value: Interval) -> str:
    if math.isnan(value.mean):
        return "–"
    interval = "" if math.isnan(value.low) else f" [{value.low:.2f}, {value.high:.2f}]"
    return f"{value.mean:.2f}{interval}"


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.2f}"
