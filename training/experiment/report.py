"""Results → report.html (self-contained), results.json, and figures.

figures/curves.svg          the primary measure by step, for the main arms and both sets of prompts
figures/differences.svg     differences of arms with their intervals
figures/pictures.png        images of the same prompts by each arm
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from capstan.pipeline.html import interval_plots, page
from capstan.pipeline.html.page import Html
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import oracle
from capstan.training.experiment.arms import Trial
from capstan.training.experiment.config import MAIN
from capstan.training.experiment.contact_sheet import side_by_side
from capstan.training.experiment.intervals import Interval
from capstan.training.experiment.measure import Measurements
from capstan.training.experiment.prompts import SETS, UPSAMPLED, Prompts
from capstan.training.experiment.results import Difference, Results

REPORT: Final = "report.html"
_STATISTICS: Final = ("distinct", "trained_on", "kept")
_ROWS: Final = 4  # prompts shown per set
_MEANS: Final = {
    "followed": "share of a prompt's statements (things, their size, pattern and place, count, background, relation) "
    "that the image satisfies",
    "followed_strict": "the same; each thing that the prompt does not mention counts as one more failed statement",
    "colour_shape": "share of the coloured shapes in the prompt that are in the image",
    "colour_binding": "of the things whose shape is in the image, the share with the right colour",
    "shape_binding": "of the things whose colour is in the image, the share with the right shape",
    "shapes": "share of the shapes in the prompt that are in the image, in any colour",
    "size": "of the things in the image, the share with the right size",
    "texture": "of the things in the image, the share with the right pattern",
    "count": "whether the number of things is right",
    "background": "whether the background is right",
    "relation": "whether both things are in the image and their relation is right",
    "clip_mean": "CLIP score: 100 × the cosine of image and sentence, averaged over the prompt's sentences",
    "clip_min": "the same, for the sentence that fits worst",
}


def write_report(storage: Storage, results: Results, measurements: Measurements, prompts: Prompts) -> str:
    """Publish results.json, the figures and, last, report.html; return its path."""
    storage.write("results.json", json.dumps(results.facts(), indent=1, ensure_ascii=False).encode() + b"\n")
    images = _images(results, measurements, prompts)
    for name, data in _figures(results, images).items():
        storage.write(f"figures/{name}", data)
    storage.write(REPORT, _page(results, images).html().encode())
    return f"{storage.url}/{REPORT}"


def _page(results: Results, images: bytes | None) -> page.Page:
    finished = ", ".join(f"{arm} {len(seeds)}" for arm, seeds in results.seeds.items())
    made = page.Page(
        "Which captions make a model follow prompts?",
        page.paragraph(
            "One recipe is trained once per arm and seed. Arms see the same images in the same order and start from "
            "the same weights. They differ only in the share of captions that the loader draws from each kind."
        ),
        page.note(f"Finished runs: {finished}; {results.prompts} prompts per set."),
    )
    made.section("Findings", *(page.paragraph(text) for text in results.found))
    if len(results.arms) < 2:
        return made
    made.section("By arm", *_by_arm(results))
    made.section("Differences", *_differences(results))
    made.section("By step", *_curves(results))
    if images is not None:
        text = "The first prompts of each set, with the same noise for every arm."
        made.section("Images of the same prompts", page.note(text), page.image(images, "images by prompt and arm"))
    made.section("Expanded prompts", *_expanded(results))
    made.section("Captions used", _blends(results), *_truth(results))
    made.section("Cost", _cost(results))
    made.section("Method", *_method(results))
    return made


# Sections ------------------------------------------------------------------------------------------------------------


def _by_arm(results: Results) -> Iterable[Html]:
    yield page.note("At the last step: mean [95% interval].")
    for part in results.table:
        measures = results.table[part]
        yield page.heading(f"{part} prompts")
        rows = [[arm, *(_cell(measures[m][arm]) for m in measures)] for arm in results.arms]
        for name, sets in results.references.items():
            if part in sets:
                label = {"truth": "(the true images)", "chance": "(images of other prompts)"}[name]
                rows.append([label, *(page.number(sets[part].get(m)) for m in measures)])
        yield page.table(["arm", *map(oracle.title, measures)], rows)


def _differences(results: Results) -> Iterable[Html]:
    yield page.note(
        f"{results.primary.replace('_', ' ')}, on the same prompts and seeds, for entries defined in both arms. "
        "Intervals are not corrected for multiple comparisons: of twenty true differences of 0, one is expected to "
        "exclude 0."
    )
    yield page.grid(
        interval_plots.forest(f"{part} prompts", _rows(results.differences[part][results.primary]))
        for part in results.table
    )
    yield page.heading("All measures, main arms")
    rows_of_all = [
        [part, oracle.title(m), *(_signed(d.value) for d in _main(results, part, m))]
        for part, measures in results.differences.items()
        for m in measures
    ]
    names = [f"{d.a} − {d.b}" for d in _main(results, SETS[0], results.primary)]
    if names:
        yield page.table(["prompts", "measure", *names], rows_of_all)
        yield page.note("* excludes 0.")


def _main(results: Results, part: str, measure: str) -> list[Difference]:
    return [d for d in results.differences[part][measure] if d.a in MAIN and d.b in MAIN]


def _rows(differences: Sequence[Difference]) -> list[tuple[str, float, float, float]]:
    return [(f"{d.a} − {d.b}", d.value.mean, d.value.low, d.value.high) for d in differences]


def _curves(results: Results) -> Iterable[Html]:
    yield interval_plots.key(results.arms)
    yield page.note("Bands are 95% intervals over prompts and seeds.")
    for part, measures in results.curves.items():
        yield page.heading(f"{part} prompts")
        yield page.grid(interval_plots.bands(oracle.title(m), _lines(results, part, m)) for m in measures)


def _lines(
    results: Results, part: str, measure: str, arms: Sequence[str] = ()
) -> dict[str, list[interval_plots.Point]]:
    curves = results.curves[part][measure]
    return {
        arm: [(step, value.mean, value.low, value.high) for step, value in curves[arm]] for arm in arms or results.arms
    }


def _expanded(results: Results) -> Iterable[Html]:
    if not results.expanding:
        yield page.note("Not run: the recipe has no upsampler (experiment.upsampler).")
        return
    yield page.note(
        "Original prompts without changes, and expanded into the style of the descriptive captions. Both are scored "
        "against the original prompt. Mean [95% interval]."
    )
    for measure in results.expanding:
        yield page.heading(oracle.title(measure))
        rows = [
            [
                arm,
                _cell(results.table[SETS[0]][measure][arm]),
                _cell(results.table[UPSAMPLED][measure][arm]),
                _signed(change),
            ]
            for arm, change in results.expanding[measure].items()
        ]
        yield page.table(["arm", "without", "with", "with − without"], rows)


def _blends(results: Results) -> Html:
    def shares(blend: dict[str, float]) -> str:
        return ", ".join(f"{slot} {100 * share:.1f}%" for slot, share in sorted(blend.items(), key=lambda s: -s[1]))

    rows = [
        [arm, blend["layer"] or "–", shares(blend["asked"]), shares(blend["drawn"])]
        for arm, blend in results.blends.items()
    ]
    remark = page.note(
        "If the captioner's text was rejected or is missing, the original caption is used instead. The drawn share of "
        "original captions can therefore be higher than the requested one."
    )
    return Html(remark + page.table(["arm", "layer", "requested", "drawn"], rows))


def _truth(results: Results) -> Iterable[Html]:
    """Yield the section on the captions' accuracy."""
    if not results.captions:
        return
    names = list(next(iter(results.captions.values())))
    rows = [[slot, *(page.number(stated[name]) for name in names)] for slot, stated in results.captions.items()]
    yield page.heading("Accuracy")
    yield page.note(
        "Share of attributes that captions state correctly; an attribute that a caption does not mention counts as "
        "wrong. Size, texture and place refer to things named with the right colour and shape."
    )
    yield page.table(["captions", *map(oracle.title, names)], rows)


def _cost(results: Results) -> Html:
    rows: list[list[Any]] = [
        [arm, c["runs"], f"{c['training_s']:,.0f}", c["images"], f"{c['measuring_s']:,.0f}", c["pictures"]]
        for arm, c in results.cost.items()
    ]
    total = [sum(c[name] for c in results.cost.values()) for name in ("runs", "training_s", "images")]
    rest = [sum(c[name] for c in results.cost.values()) for name in ("measuring_s", "pictures")]
    rows.append(["all", total[0], f"{total[1]:,.0f}", total[2], f"{rest[0]:,.0f}", rest[1]])
    header = ["arm", "runs", "training, s", "images seen", "measuring, s", "images drawn"]
    remark = page.note(
        "Seconds are measured by each run, on a machine that may have trained several at once. They exclude start-up, "
        "saving, and the work that all arms share: captioner, captions, autoencoder, latents, the scoring CLIP."
    )
    return Html(remark + page.table(header, rows))


def _method(results: Results) -> Iterable[Html]:
    yield page.paragraph(
        "Original prompts are captions as found with images; descriptive prompts describe images. The images were not "
        "trained on. Images are generated with the averaged weights of each step. The primary measure was chosen "
        f"beforehand: {results.primary.replace('_', ' ')}. Intervals come from a bootstrap over prompts and seeds, "
        "widened for few seeds (training/experiment/intervals.py)."
    )
    yield page.note(
        "Short captions repeat: a prompt can be, word for word, the caption of a training image. Expanded prompts may "
        "not mention everything in the original prompt; images are scored against the original prompt."
    )
    yield page.table(
        ["prompts", "distinct texts", "share that are training captions", "share of things still named"],
        [[part, *(page.number(values.get(name)) for name in _STATISTICS)] for part, values in results.asked.items()],
    )
    shown = {m for measures in results.table.values() for m in measures}
    yield page.table(["measure", "definition"], [[oracle.title(m), _MEANS[m]] for m in _MEANS if m in shown])
    if "clip_mean" not in shown:
        yield page.note("CLIP score: not run, because the recipe has no scorer (experiment.scorer).")


# Figures -------------------------------------------------------------------------------------------------------------


def _figures(results: Results, images: bytes | None) -> dict[str, bytes]:
    if len(results.arms) < 2:
        return {}
    arms = [arm for arm in results.arms if arm in MAIN or arm.startswith("truth")] or results.arms
    places = {arm: interval_plots.COLOURS[number % len(interval_plots.COLOURS)] for number, arm in enumerate(arms)}
    name = oracle.title(results.primary)
    curves = [
        (
            f"{name}, {part} prompts",
            interval_plots.bands(name, _lines(results, part, results.primary, arms), colours=list(places.values())),
        )
        for part in results.curves
    ]
    differences = []
    for part in SETS:
        rows = _rows(_main(results, part, results.primary))
        differences.append((f"{name}, {part} prompts", interval_plots.forest(name, rows, width=420)))
    made = {
        "curves.svg": interval_plots.standalone(curves, arms),
        "differences.svg": interval_plots.standalone(differences),
    }
    return made | ({"pictures.png": images} if images is not None else {})


def _images(results: Results, measurements: Measurements, prompts: Prompts) -> bytes | None:
    """Return a PNG of the first prompts of each set by every arm's first seed, with the true image if there is one."""
    rows = []
    for part in (*SETS, *([UPSAMPLED] if UPSAMPLED in prompts else [])):
        drawn = {arm: measurements.images(Trial(arm, seeds[0]).name, part) for arm, seeds in results.seeds.items()}
        if not drawn or not all(drawn.values()):
            continue
        for number in range(min(_ROWS, *(len(images) for images in drawn.values()))):
            prompt = prompts[part][number]
            columns: dict[str, np.ndarray | None] = {} if prompt.image is None else {"truth": prompt.image}
            text = prompt.text if prompt.drawn is None else f"{prompt.text}, expanded: {prompt.drawn}"
            rows.append((text, columns | {arm: images[number] for arm, images in drawn.items()}))
    return side_by_side(rows) if rows else None


def _cell(value: Interval) -> str:
    """
    >>> _cell(Interval(0.5, 0.25, 0.75)), _cell(Interval(31.0, 30.5, 31.5))
    ('0.500 [0.250, 0.750]', '31.00 [30.50, 31.50]')
    """
    if math.isnan(value.mean):
        return "–"
    digits = 2 if abs(value.mean) >= 10 else 3
    if math.isnan(value.low):
        return f"{value.mean:.{digits}f}"
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _signed(value: Interval) -> str:
    if math.isnan(value.mean):
        return "–"
    if math.isnan(value.low):
        return f"{value.mean:+.3f}"
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]" + (" *" if value.excludes_zero else "")
