"""`capstan demo`: every stage, in order, on a captioned world that Capstan draws

Each stage makes the same call as its own command, on a recipe in the demo's folder, and prints one progress line. Each
resumes where it stopped, and so does the demo. It ends with the grid of images drawn from prompts and report.html.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TextIO

import yaml

from capstan.cluster.demo import recipes
from capstan.cluster.recipe import load
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.captions import descriptive, short
from capstan.pipeline.world.oracle import title
from capstan.pipeline.world.table import scene_of_url
from capstan.recaption.store import write_given_layer

SCENES = 256  # unseen scenes on which the model is evaluated
_TIMES: Final = "times.json"  # stage → seconds

Stage = tuple[str, Callable[[], dict[str, Any]]]  # title, function


def run_demo(folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Run the stages that are not done yet. Return the paths of the grid and the report, and the measures.

    `quick`: a few images and steps, to see that everything runs on this machine.
    """
    return run_stages(folder, Demo(folder, quick).stages, "demo.log", ("grid", "report"))


def run_stages(folder: Path, stages: Sequence[Stage], log: str, show: Sequence[str] = ()) -> dict[str, Any]:
    """Run named stages in order, print a line for each, then the results named in `show`. Return all results."""
    storage = Storage(str(folder), field="DIR")
    storage.check_writable()
    summary: dict[str, Any] = {}
    started = time.monotonic()
    with _log_to(folder / log) as terminal:
        for number, (name, stage) in enumerate(stages, 1):
            began = time.monotonic()
            with _line(f"{number}/{len(stages)} {name}", terminal) as conclude:
                result = stage()
                conclude(result.pop("outcome"))
                summary |= result
            _note_time(storage, name, time.monotonic() - began)
    print(f"done in {(time.monotonic() - started) / 60:.1f} min{'; see' if show else ''}", file=sys.stderr)
    for name in show:
        print(f"  {summary[name]}", file=sys.stderr)
    return summary


def read_times(storage: Storage) -> dict[str, float]:
    """Return stage → seconds that it took, over all runs in this folder."""
    try:
        return dict(storage.read_json(_TIMES, "remove it"))
    except FileNotFoundError:
        return {}


def _note_time(storage: Storage, stage: str, seconds: float) -> None:
    times = read_times(storage)
    times[stage] = round(times.get(stage, 0) + seconds, 1)
    storage.write(_TIMES, json.dumps(times, indent=1).encode())


class Demo:
    """The stages, in order. Each returns {"outcome": one line, ...}."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.scenes = folder, 16 if quick else SCENES
        self.recipes = recipes.recipes(folder, quick=quick)
        self.stages: list[Stage] = [
            ("build the web's images", lambda: self._build("web")),
            ("build the labelled images", self._build_labelled),
            ("train the captioner on web captions", lambda: self.train("captioner-base")),
            ("fine-tune it on descriptions", lambda: self.train("captioner")),
            ("recaption the web's images", self._recaption),
            ("train the autoencoder", lambda: self.train("autoencoder")),
            ("encode the images", self._encode),
            ("train the diffusion model", lambda: self.train("diffusion")),
            ("draw the prompts and measure", self._evaluate),
            ("write the report", self._report),
        ]

    def recipe(self, name: str) -> Recipe:
        """Write the recipe `name` into the demo's folder, where users can run or change it, and return it."""
        path = self.folder / "recipes" / f"{name}.yaml"
        text = yaml.safe_dump(self.recipes[name], sort_keys=False, allow_unicode=True)
        Storage(str(path.parent), field="DIR").write(path.name, text.encode())
        return load(path)

    def _build(self, name: str) -> dict[str, Any]:
        from capstan.pipeline.build import build

        built = build(self.recipe(name), progress=False)
        if built["quarantined"]:
            raise CapstanError(f"{name}: units were quarantined: {built['quarantined']}. Fix: run the demo again")
        counts = built["counts"]
        return {"outcome": f"{counts['rows']:,} rows → {counts['kept']:,} images"}

    def _build_labelled(self) -> dict[str, Any]:
        """Build the labelled images, and write their captions as a layer."""
        result, recipe = self._build("labelled"), self.recipe("labelled")
        captions = true_captions(recipe)
        write_given_layer(Storage(recipe.dataset), recipes.LABELLED_LAYER, captions)
        self._learn_vocabulary([text for slots in captions.values() for text in slots.values()])
        return result

    def _learn_vocabulary(self, labelled: list[str]) -> None:
        """Train the captioner's vocabulary on the web's captions and the labelled ones."""
        from capstan.training.data.tokenizer import Tokenizer

        web = Dataset(Storage(self.recipe("web").dataset))
        for shard in web.shard_names:
            labelled += web.table(shard, ["caption"])["caption"].to_pylist()
        Tokenizer.train(labelled, recipes.VOCABULARY).save(self.folder / recipes.TOKENIZER)

    def train(self, name: str) -> dict[str, Any]:
        """Train the model of the recipe `name`."""
        from capstan.training.launch import train

        trained = train(self.recipe(name))
        return {"outcome": f"{trained['steps']:,} steps, loss {trained['loss']:.4g}"}

    def _recaption(self) -> dict[str, Any]:
        from capstan.recaption.job import recaption

        written = recaption(self.recipe("recaption"), progress=False)
        self.recipes["diffusion"]["train"]["data"] = {"layer": written["layer"]}
        return {"outcome": f"{written['images']:,} images captioned", "layer": written["layer"]}

    def _encode(self) -> dict[str, Any]:
        from capstan.training.encode import encode

        encoded = encode(self.recipe("diffusion"), progress=False)
        self.recipes["diffusion"]["train"]["data"]["latents"] = encoded["encoder"]
        return {"outcome": f"latents {encoded['encoder']}"}

    def _evaluate(self) -> dict[str, Any]:
        from capstan.training.evaluate import evaluate

        run = self.folder / "diffusion"
        known = run / "evaluation.json"
        if known.exists() and known.stat().st_mtime > (run / "finished.json").stat().st_mtime:
            measured = json.loads(known.read_text())
        else:
            measured = evaluate(run, count=self.scenes)
        outcome = ", ".join(f"{title(name)} {entry['value']:.2f}" for name, entry in measured["measures"].items())
        return {"outcome": outcome, "measures": measured["measures"], "grid": str(run / "evaluation.png")}

    def _report(self) -> dict[str, Any]:
        from capstan.cluster.demo.report import write_demo_report

        times = read_times(Storage(str(self.folder), field="DIR"))
        path = write_demo_report(self.folder, {name: self.recipe(name) for name in self.recipes}, times)
        return {"outcome": str(path), "report": str(path)}


def true_captions(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return key → slot → true caption, for every image of a captioned world."""
    assert recipe.source is not None
    assert recipe.source.world is not None
    dataset, captions = Dataset(Storage(recipe.dataset)), {}
    for shard in dataset.shard_names:
        table = dataset.table(shard, ["key", "url"])
        for key, url in zip(table["key"].to_pylist(), table["url"].to_pylist(), strict=True):
            scene = scene_of_url(recipe.source.world, url)
            captions[key] = {"short": short(scene), "descriptive": descriptive(scene)}
    return captions


@contextlib.contextmanager
def _line(title: str, terminal: TextIO) -> Iterator[Callable[[str], None]]:
    """Print one line per stage: its title while it runs, then its outcome and how long it took."""
    from rich.console import Console

    console = Console(file=terminal, highlight=False)
    outcome: list[str] = []
    started = time.monotonic()
    status = console.status(title) if console.is_terminal else contextlib.nullcontext()
    if not console.is_terminal:
        console.print(f"{title} …", soft_wrap=True)
    with status:
        yield outcome.append
    console.print(f"{title}: {outcome[0]} ({time.monotonic() - started:.0f} s)", soft_wrap=True)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[TextIO]:
    """Send log lines, and what libraries write to stderr, to a file instead of between the progress lines.

    Yields the original stderr, for these lines.
    """
    root = logging.getLogger()
    before, log = root.handlers[:], path.open("a", encoding="utf-8")
    handler = logging.StreamHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    sys.stderr.flush()
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as terminal:
        root.handlers = [handler]
        os.dup2(log.fileno(), 2)  # Ray's core writes there itself
        try:
            yield terminal
        finally:
            sys.stderr.flush()
            terminal.flush()
            os.dup2(terminal.fileno(), 2)
            root.handlers = before
            log.close()
