"""A training run → report.html in its folder: one file without script, also of a run that still trains"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from PIL import Image

from capstan.pipeline.html import page, plots
from capstan.pipeline.html.page import Html
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.run_files import RunFiles, is_run, smoothed

REPORT: Final = "report.html"
_GRIDS: Final = 8
_GRID_BYTES: Final = 3_200_000  # of all grids
_SIDES: Final = (1000, 800, 640, 480, 320)  # longest side of a grid in pixels: the first with which all fit is used
_PLAIN: Final = {"grad_norm": "Norm of the gradient", "lr": "Learning rate", "images_per_s": "Images per second"}
_SHARES: Final = {"mfu": "MFU", "data_wait": "Share of time spent waiting for data"}


def report_of_run(storage: Storage) -> str | None:
    """Publish the report of the run in a folder and return its path; None if the folder holds no run."""
    if not is_run(storage):
        return None
    storage.write(REPORT, run_report(RunFiles(storage, storage.url.rstrip("/").rpartition("/")[2])).encode())
    return f"{storage.url}/{REPORT}"


def run_report(run: RunFiles) -> str:
    """Return the whole page as HTML."""
    made = page.Page(run.name or "run", *map(page.note, _state(run)), _figures(run))
    made.section("Curves", page.grid(_curves(run)))
    if grids := list(_grids(run)):
        made.section("Samples", page.gallery(grids, wide=True))
    if run.evaluations:
        made.section("Evaluation", *_evaluations(run))
    made.section("Cost", page.table(["", ""], _cost(run)))
    if run.versions:
        made.section("Versions", page.table(["package", "version"], sorted(map(_texts, run.versions.items()))))
    recipe = json.dumps(run.recipe, indent=2, ensure_ascii=False)
    made.section("Recipe", page.details("The recipe, as it was resolved", recipe))
    return made.html()


def _state(run: RunFiles) -> Iterator[str]:
    yield f"{run.storage.url}: {run.state} after step {run.step:,} of {run.steps:,}"
    if run.unreadable:
        yield f"{run.unreadable:,} lines of its logs cannot be read and are left out."


def _figures(run: RunFiles) -> Html:
    loss, rate, mfu = (run.last_of(name) for name in ("loss", "images_per_s", "mfu"))
    shown = {"Model": str(run.train.get("model", "")), "Steps": f"{run.step:,}", "Loss": page.number(loss)}
    samples = run.last_of("samples")
    shown |= {"Images shown": "–" if samples is None else f"{samples:,.0f}", "Time": duration(run.seconds())}
    shown |= {"Images/s": page.number(rate)} | ({} if mfu is None else {"MFU": f"{mfu:.1%}"})
    for name, value in list(_measures(run.evaluations[-1]).items())[:2] if run.evaluations else []:
        shown[name] = page.number(value)
    return page.figures(shown)


def _curves(run: RunFiles) -> Iterator[Html]:
    found = run.series()
    if loss := found.get("loss"):
        kinds = ("third", "first")
        weight = 1 - 1 / max(len(loss["y"]) / 30, 1)  # a longer log is noisier at this width
        lines = {"logged": (loss["x"], loss["y"]), "smoothed": (loss["x"], smoothed(loss["y"], weight))}
        yield plots.curves("Loss", lines, logarithmic=min(loss["y"]) > 0, kinds=kinds)
    if profile := list(_profile(run)):
        yield plots.curves("Loss by timestep", dict(profile), note="from clean (0) to pure noise (1)")
    for name, title in (_PLAIN | _SHARES).items():
        if name in found:
            log = name in ("lr", "grad_norm") and min(found[name]["y"]) > 0
            yield plots.curves(title, {title: (found[name]["x"], found[name]["y"])}, logarithmic=log)
    blend = {name: line for name, line in found.items() if name.startswith("blend/")}
    if blend:
        largest = sorted(blend, key=lambda name: -blend[name]["y"][-1])[:3]
        lines = {name.removeprefix("blend/"): (blend[name]["x"], blend[name]["y"]) for name in largest}
        yield plots.curves("Captions shown, by slot", lines)
    for name, line in found.items():
        if name.startswith("evaluation/"):
            title = name.removeprefix("evaluation/")
            yield plots.curves(title, {title: (line["x"], line["y"])})


def _profile(run: RunFiles) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Yield the loss over time at the start, in the middle and at the end of what was logged."""
    logged = [record for record in run.records if isinstance(record.get("loss_by_time"), dict)]
    for place in sorted({0, len(logged) // 2, len(logged) - 1}) if logged else []:
        points = []
        for band, value in logged[place]["loss_by_time"].items():
            low, _, high = band.partition("-")
            try:
                points.append(((float(low) + float(high)) / 2, float(value)))
            except (ValueError, TypeError):
                continue
        if points:
            times, losses = zip(*sorted(points), strict=True)
            yield f"step {logged[place]['step']:,}", (list(times), list(losses))


def _grids(run: RunFiles) -> Iterator[Html]:
    """Yield a few grids from the first to the last, small enough for the page."""
    steps = sorted(run.grids)
    if len(steps) > _GRIDS:
        steps = [steps[round(n * (len(steps) - 1) / (_GRIDS - 1))] for n in range(_GRIDS)]
    opened = [(step, _open(run.storage.read(run.grids[step]))) for step in steps]
    images = [(step, image) for step, image in opened if image is not None]
    made: list[bytes] = []
    for side in _SIDES:
        made = [_jpeg(image, side) for _, image in images]
        if sum(map(len, made)) <= _GRID_BYTES:
            break
    prompts = _prompts(run)
    for (step, _), data in zip(images, made, strict=True):
        yield page.card(page.image(data, f"samples after step {step:,}: {prompts}"), f"step {step:,}")


def _open(png: bytes) -> Image.Image | None:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _jpeg(image: Image.Image, side: int) -> bytes:
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=84)
    return file.getvalue()


def _prompts(run: RunFiles) -> str:
    watch = run.train.get("watch")
    samples = watch.get("samples") if isinstance(watch, dict) else None
    prompts = samples.get("prompts") if isinstance(samples, dict) else None
    return page.clip("; ".join(map(str, prompts)), 500) if isinstance(prompts, list) else "prompts of the dataset"


def _evaluations(run: RunFiles) -> Iterator[Html]:
    if "value" in run.best and "step" in run.best:
        best = f"Best {run.best.get('measure', '')}: {page.number(run.best['value'])} after step {run.best['step']}."
        yield page.paragraph(best)
    names = list(dict.fromkeys(name for record in run.evaluations for name in _measures(record)))
    rows = [
        [record["step"], _plain(record.get("count")), *(_measures(record).get(name) for name in names)]
        for record in run.evaluations[-50:]
    ]
    yield page.table(["step", "images", *names], rows)


def _measures(record: dict[str, Any]) -> dict[str, float | None]:
    measures = record.get("measures")
    listed = measures.items() if isinstance(measures, dict) else ()
    return {name: _plain(value) for name, value in listed}


def _plain(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cost(run: RunFiles) -> Iterator[Sequence[Any]]:
    yield "time of its steps", duration(run.seconds())
    if flops := run.flops():
        yield "floating-point operations", f"{flops:.3g}"
    for name, title in (("memory_gib", "peak memory of a GPU"), ("host_memory_gib", "memory of a worker")):
        values = [value for record in run.records if (value := _plain(record.get(name))) is not None]
        if values:
            yield title, f"{max(values):.1f} GiB"
    if engine := run.engine():
        yield "engine", page.clip(engine, 300)
    evaluated = sum(_plain(record.get("seconds")) or 0 for record in run.evaluations)
    if evaluated:
        yield "time of its evaluations", duration(evaluated)
    if run.checkpoints:
        yield "checkpoints kept", ", ".join(f"{step:,}" for step in run.checkpoints[-20:])


def _texts(pair: Iterable[Any]) -> list[str]:
    return [str(value) for value in pair]


def duration(seconds: float) -> str:
    """Return a duration for people.

    >>> duration(42), duration(312), duration(7380), duration(200_000)
    ('42 s', '5 min', '2 h 3 min', '2 d 7 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
