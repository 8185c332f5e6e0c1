"""A finished run → evaluation.json, with chance levels (`capstan evaluate`)

Measures unseen scenes of the captioned world, or held-out samples (training.metrics.samples).

    a generator     prompts → images → oracle, CLIP score, KID, CMMD, FID. Chance: the same metrics for images of other
                    prompts. Ceiling: for true images, after the autoencoder if there is one; of a distance (KID, CMMD,
                    FID): between two disjoint halves of the true images
    a matcher       drawings and texts → R-precision of 100 texts. Chance: a text drawn at random
    a first stage   drawings → latents → drawings: PSNR. Chance: an image of the drawings' mean colour. A VQGAN's
                    codebook use, too. Chance: a codebook with one code in use. Of sounds: the ratio of signal to noise.
                    Of clips: the PSNR of their frames, and the oracle's measures
"""

from __future__ import annotations

import functools
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from capstan.pipeline.config import CopyDetection, Recipe, WorldSource, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import oracle
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, vocabulary
from capstan.training.config import TrainConfig
from capstan.training.config.monitoring import ClipSettings, Evaluate, Fid, Measure
from capstan.training.data.sounds import Form
from capstan.training.drawing.drawer import ClipCodec, Codec, Drawer, Drawn, Kind, Matcher, Options, SoundCodec
from capstan.training.drawing.grid import grid, sheet
from capstan.training.metrics.ceiling import ceiling
from capstan.training.metrics.clips import measure_clips
from capstan.training.metrics.metric import Metric, check_kinds, make_metrics, random_state_kept, single_worker
from capstan.training.metrics.oracle import OracleScore
from capstan.training.metrics.r_precision import r_precision
from capstan.training.metrics.samples import EvalSet, Scenes, make_eval_set, world_of
from capstan.training.metrics.sounds import FilmOracle, SoundOracle, measure_codec
from capstan.training.product import family_of, find_product, kind_of
from capstan.training.sample import open_sampler

if TYPE_CHECKING:
    from capstan.training.family import Family
    from capstan.training.metrics.memorisation import Memorisation

logger = logging.getLogger(__name__)

_SHOWN: Final = 16  # images in evaluation.png
_DRAWS: Final = "name a run of a model that draws, e.g. model: diffusion, or remove it"

Evaluation = dict[str, Any]


def evaluate(
    run: str | Path,
    *,
    count: int = 128,
    measures: Sequence[Measure] | None = None,
    clip: ClipSettings | None = None,
    fid: Fid | None = None,
    world: WorldSource | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    level: float | None = None,
    batch: int = 32,
    copies: CopyDetection | None = None,
) -> Evaluation:
    """Measure a run on `count` unseen scenes or held-out samples; return the summary.

    `measures` default to oracle, to world for a model without prompts, to none but its own for one that continues
    images. Writes evaluation.json and evaluation.png into
    the run's folder. `clip` and `fid` name the judging networks (default: train.watch.evaluate of the run's recipe).
    `world` is the captioned world that the run was trained on (default: from its recipe). `copies` names the network
    that finds copies of training images; the nearest pairs are drawn to evaluation-copies.png. A model with
    attention to words draws it to evaluation-attention.png. `steps`, `guidance`, `sampler` and `level` replace those of
    the run's recipe, as in `sample`. Raises RecipeError if a file, a package or the ground truth is missing, or the
    model has no such option.
    """
    if count < 2:
        raise RecipeError("--count", f"{count} scenes have no chance level", "use 2 or more")
    product = find_product(run)
    family, kind = family_of(product), kind_of(product)
    device, explained = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    if family is not None and family.draws is not None:
        if copies is not None and family.draws not in ("image", "scene"):
            raise RecipeError("--copies", f"compares images, and this model draws {family.draws}s", "remove it")
        drawer = open_sampler(product, str(device), sampler, level)
        measures = _default(drawer) if measures is None else measures
        alone = world is not None and tuple(measures) in (("oracle",), ("world",)) and copies is None
        recipe = None if alone else _recipe_of(product)
        subjects = _subjects(recipe, product, world, count)
        memory = None if copies is None else _memorisation(recipe, copies)
        judges, unused = (_judges(recipe, measures, clip, fid, count, family.draws) if measures else [] for _ in "ab")
        for judge in judges:
            judge.check(subjects)
        check_kinds(judges, family.draws, "--measures", prompted=drawer.prompted)
        twice = list(zip(judges, unused, strict=True))
        result, image, images = _drawn(drawer, subjects, twice, steps=steps, guidance=guidance, batch=batch)
        if sampler is not None:
            result["sampling"]["sampler"] = sampler
        explained = drawer.explained(subjects.prompts(range(count)), range(count))
        if memory is not None:
            result |= _copies(memory, result["measures"], images, subjects, run)
    else:
        options = {"copies": copies, "steps": steps, "guidance": guidance, "sampler": sampler, "level": level}
        if given := [name for name, value in options.items() if value is not None]:
            raise RecipeError(f"--{given[0]}", f"{kind} draws no images of its own", _DRAWS)
        result, image = _of_images(family, product, world, count, device, batch)
    result = {"kind": kind, "scenes": count, **result}
    _publish(run, result, {"evaluation.png": image, "evaluation-attention.png": explained})
    logger.info("evaluate: %s", _summary_line(result["measures"]))
    return result


def _default(drawer: Drawer) -> tuple[Measure, ...]:
    """Return the metrics of a model that none are named for; none but its own if it continues images."""
    if drawer.continues is not None:
        return ()
    return ("oracle",) if drawer.prompted else ("world",)


def _publish(run: str | Path, result: Evaluation, sheets: Mapping[str, Any]) -> None:
    """Write the sheets that there are, and, last, evaluation.json, which marks a complete evaluation."""
    storage = Storage(str(run), field="RUN")
    for name, drawn in sheets.items():
        if drawn is not None:
            drawn.save(png := io.BytesIO(), format="PNG")
            storage.write(name, png.getvalue())
    storage.write("evaluation.json", json.dumps(result, indent=1).encode() + b"\n")


def _of_images(
    family: type[Family] | None, product: Path, world: WorldSource | None, count: int, device: torch.device, batch: int
) -> tuple[dict[str, Any], Any]:
    """Return measures and a sheet of a model that reads images: a matcher of images and texts, or a first stage."""
    matcher = None if family is None else family.matcher(product, device)
    if matcher is not None:
        return _matched(matcher, _subjects(None if world else _recipe_of(product), product, world, count), batch=batch)
    codec = None if family is None else family.codec(product, device)
    if codec is not None:
        if isinstance(codec, SoundCodec):
            return measure_codec(codec, _subjects(_recipe_of(product), product, None, count), batch=batch)
        if isinstance(codec, ClipCodec):
            return measure_clips(codec, _subjects(_recipe_of(product), product, None, count), batch=batch)
        return _encoded(codec, Scenes(world or _world_of(product), count).scenes, batch=batch)
    problem = f"cannot evaluate a model of kind {kind_of(product) or 'unknown'} ({product})"
    raise RecipeError("RUN", problem, "name a run of a model that draws, or of a first stage")


def _recipe_of(product: Path) -> Recipe:
    """Return the recipe of a product: recipe.json is in its run folder, up to three levels above."""
    for folder in (product, *product.parents[:3]):
        if (folder / "recipe.json").is_file():
            return Recipe.model_validate(json.loads((folder / "recipe.json").read_text())["recipe"])
    hint = "name a run folder that was trained on `format: world`"
    raise RecipeError("RUN", f"no recipe.json in {product} or its run folder, so its training data is unknown", hint)


def _world_of(product: Path) -> WorldSource:
    """Return the captioned world that the run's dataset was built from."""
    if (world := world_of(_recipe_of(product))) is None:
        hint = "name a run folder that was trained on `format: world`"
        raise RecipeError("RUN", f"{product} was not trained on the captioned world, so there is no ground truth", hint)
    return world


def _subjects(recipe: Recipe | None, product: Path, world: WorldSource | None, count: int) -> EvalSet:
    if recipe is None or world is not None or (world := world_of(recipe)) is not None:
        assert world is not None
        return Scenes(world, count)
    train = TrainConfig.from_recipe(recipe)
    folders = (product, *product.parents[:3])
    pinned = next((f / "pinned.json" for f in folders if (f / "pinned.json").is_file()), None)
    layer = json.loads(pinned.read_text()).get("layer") if pinned else None
    return make_eval_set(recipe, train, layer, count, "--count")


def _judges(
    recipe: Recipe | None,
    measures: Sequence[Measure],
    clip: ClipSettings | None,
    fid: Fid | None,
    count: int,
    kind: Kind,
) -> list[Metric]:
    """Return the metrics, set up by the options or else by the run's recipe."""
    settings: dict[str, Any] = {"measures": list(measures), "count": count}
    section = (recipe.train if recipe is not None else None) or {}
    from_recipe = (section.get("watch") or {}).get("evaluate") or {}
    settings |= {name: from_recipe[name] for name in ("kid", "cmmd") if from_recipe.get(name) is not None}
    for name, given in (("clip", clip), ("fid", fid), ("fad", fid if "fad" in measures else None)):
        settings[name] = from_recipe.get(name) if given is None else given.model_dump()
        if given is None and settings[name] is not None:  # a run may be a stranger's, and so cannot vouch for a program
            settings[name] = {key: value for key, value in settings[name].items() if key != "trust_torchscript"}
    networks = {"clip": ("clip",), "cmmd": ("cmmd", "clip"), "fid": ("fid",), "kid": ("fid",), "consistency": ("clip",)}
    networks["fad"] = ("fad",)
    for name in measures:
        if name in networks and all(settings.get(network) is None for network in networks[name]):
            hint = "add --clip MODEL" if name in ("clip", "cmmd", "consistency") else "add --features FILE"
            raise RecipeError("--measures", f"{name} needs a model, and the run's recipe does not name one", hint)
    return make_metrics(validate(Evaluate, settings, "train.watch.evaluate"), "train.watch.evaluate", kind)


# Generators ----------------------------------------------------------------------------------------------------------


def _drawn(
    drawer: Drawer,
    subjects: EvalSet,
    judges: Sequence[tuple[Metric, Metric]],
    *,
    steps: int | None,
    guidance: float | None,
    batch: int,
) -> tuple[Evaluation, Any, np.ndarray]:
    """Return the metrics of images generated from prompts, a grid of the first of them, and all of them.

    Each metric comes twice: its second copy measures the ceiling of a distance.
    """
    numbers = range(len(subjects))
    prompts = subjects.prompts(numbers)
    given: Options = {"steps": steps, "guidance": guidance}
    if drawer.continues is not None:
        given["first_frames"] = subjects.clips(numbers, *drawer.continues)[:, 0]
    drawn = drawer.draw(prompts, numbers, batch=batch, **given)
    images, side = drawn.images, drawn.images.shape[-2]
    true = _true(subjects, numbers, drawn)
    reconstructed = drawer.ceiling(true, batch)
    others = [(number + 1) % len(subjects) for number in numbers]
    measures: Evaluation = {}
    reliability: Evaluation = {}
    for judge, unused in judges:
        judged = functools.partial(_measure, judge, subjects, batch=batch, device=drawer.device)
        seen = judge.seen(drawn)
        value = judged(numbers, seen)
        if judge.uses_prompts:
            best = judged(numbers, judge.truth(subjects, numbers, reconstructed))
        else:
            unused.seen(drawn)  # which form the truth has
            best = _ceiling(unused, subjects, side, batch, drawer.device)
        if isinstance(judge, OracleScore) and isinstance(subjects, Scenes):
            chance = oracle.chance(subjects.scenes, list(images))
            reliability = {"oracle": oracle.accuracy_on_clean(side, vocabulary(subjects.world))}
        else:
            chance = judged(others, judge.mismatched(seen)) if judge.uses_prompts else {}
            if isinstance(judge, SoundOracle | FilmOracle):
                reliability = {"oracle": judged(numbers, true)}
        for name in value:
            row = {"value": value[name], "chance": chance.get(name, math.nan), "ceiling": best.get(name, math.nan)}
            measures[name] = {kind: _or_none(number) for kind, number in row.items()}
    for name, numbers_of in drawer.measures(true, prompts, batch, steps=steps, guidance=guidance).items():
        measures[name] = {**{kind: _or_none(number) for kind, number in numbers_of.items()}, "ceiling": None}
    for name, changed in drawer.ablated(prompts, list(numbers), batch).items():
        found = [_measure(judge, subjects, numbers, changed, batch=batch, device=drawer.device) for judge, _ in judges]
        rows = {measure: _or_none(value) for values in found for measure, value in values.items()}
        reliability.setdefault("ablations", {})[name] = rows
    result = {"measures": measures, **reliability, "sampling": drawer.settings(steps=steps, guidance=guidance)}
    labels = prompts if drawer.prompted else [f"seed {number}" for number in numbers]
    return result, sheet(drawn.first(_SHOWN), labels[:_SHOWN]), images


def _true(subjects: EvalSet, numbers: Sequence[int], drawn: Drawn) -> np.ndarray:
    """Return the truth of what was drawn, in the same form: images, clips or sounds."""
    if drawn.kind == "sound":
        assert drawn.rate is not None, "sounds have a rate"
        _, values, channels = drawn.arrays.shape
        return subjects.sounds(numbers, Form(drawn.rate, channels, values))
    if drawn.kind == "film":
        assert drawn.sounds is not None, "films have sounds"
        form = Form(drawn.rate or 0, drawn.sounds.shape[2], drawn.sounds.shape[1])
        return subjects.films(numbers, drawn.arrays.shape[1], drawn.fps or 0.0, drawn.arrays.shape[-2], form)
    if drawn.kind == "clip":
        assert drawn.fps is not None, "clips have a rate"
        return subjects.clips(numbers, drawn.arrays.shape[1], drawn.fps, drawn.arrays.shape[-2])
    return subjects.images(numbers, drawn.images.shape[1])


def _memorisation(recipe: Recipe | None, copies: CopyDetection) -> Memorisation:
    """Return the measure of copies; the recipe's `dedup.copies` says how its own network's images are prepared."""
    from capstan.training.metrics.memorisation import Memorisation

    assert recipe is not None
    own = recipe.dedup.copies
    if own is not None and own.model == copies.model:
        stated = copies.model_dump(exclude_unset=True)
        copies = own.model_copy(update=stated)
    return Memorisation(recipe, copies, "--copies")


def _copies(
    memory: Memorisation, measures: Evaluation, images: np.ndarray, subjects: EvalSet, run: str | Path
) -> Evaluation:
    """Add the share of copies to `measures`, write the nearest pairs to evaluation-copies.png, and return them."""
    share, facts, shown = memory.measure(images, subjects.prompts(range(len(subjects))), subjects)
    measures["copies"] = {**{kind: _or_none(value) for kind, value in share.items()}, "ceiling": None}
    sheet, png = grid(np.stack([image for image, _ in shown]), [label for _, label in shown], columns=4), io.BytesIO()
    sheet.save(png, format="PNG")
    Storage(str(run), field="RUN").write("evaluation-copies.png", png.getvalue())
    return {"copies": facts}


def _measure(
    judge: Metric, subjects: EvalSet, numbers: Sequence[int], images: np.ndarray, *, batch: int, device: torch.device
) -> dict[str, float]:
    """Return a judge's values for `images`, compared with the prompts of `numbers`."""
    with random_state_kept(device), judge.ready(device):
        for start in range(0, len(numbers), batch):
            judge.add(subjects, numbers[start : start + batch], images[start : start + batch])
        return judge.result(single_worker)


def _ceiling(judge: Metric, subjects: EvalSet, side: int, batch: int, device: torch.device) -> dict[str, float]:
    """Return the values of a distance between two halves of the true images."""
    with random_state_kept(device):
        return ceiling(judge, subjects, side, device=device, batch=batch, total=single_worker)


def _scored(scenes: Sequence[Scene], images: np.ndarray) -> dict[str, float | None]:
    """Return each measure's mean over the images for which it is defined; None if there are none."""
    means = oracle.aggregate([oracle.score(scene, image) for scene, image in zip(scenes, images, strict=True)])
    return {name: _or_none(mean) for name, mean in means.items()}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


# Matchers ------------------------------------------------------------------------------------------------------------


def _matched(matcher: Matcher, subjects: EvalSet, *, batch: int) -> tuple[Evaluation, Any]:
    """Return the R-precision of true images and their texts, and a grid of images with the text that fits best."""
    numbers = range(len(subjects))
    texts, images = subjects.prompts(numbers), subjects.images(numbers, matcher.size)
    scores = matcher.similarity(images, texts, batch)
    best = [texts[text] for text in scores[:_SHOWN].argmax(1)]
    return {"measures": r_precision(scores, texts)}, grid(images[:_SHOWN], best)


# First stages --------------------------------------------------------------------------------------------------------


def _encoded(codec: Codec, scenes: Sequence[Scene], *, batch: int) -> tuple[Evaluation, Any]:
    """Return PSNR and oracle measures of drawings after the first stage, and a grid of before and after."""
    drawn = np.stack([render(scene, codec.size) for scene in scenes])
    made = codec.reconstruct(drawn, batch)
    flat = np.broadcast_to(drawn.mean((1, 2), keepdims=True), drawn.shape)
    measures: Evaluation = {"psnr": {"value": _psnr(drawn, made), "chance": _psnr(drawn, flat)}}
    measures |= codec.measures(drawn, batch)
    chance = oracle.chance(scenes, list(made))
    for name, value in _scored(scenes, made).items():
        measures[name] = {"value": value, "chance": _or_none(chance[name])}
    shown = np.stack([drawn, made], axis=1).reshape(-1, *drawn.shape[1:])[: 2 * _SHOWN]
    return {"measures": measures}, grid(shown, ["drawn", "decoded"] * (len(shown) // 2), columns=8, cell=128)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean over images of 10 log10(255² / MSE), in dB."""
    errors = ((a.astype(np.float64) - b) ** 2).mean((1, 2, 3)).clip(min=1e-10)
    return round(float((10 * np.log10(255**2 / errors)).mean()), 3)


def _summary_line(measures: Evaluation) -> str:
    rows = [(name, row["value"], row["chance"]) for name, row in measures.items() if row["value"] is not None]
    return ", ".join(
        f"{name} {value:.2f}" + ("" if chance is None else f" (chance {chance:.2f})") for name, value, chance in rows
    )
