"""The recipe's `trackers`: summaries of build, score, select and recaption → MLflow and W&B, after the command

A dataset is one run there, whatever the number of commands: a command's numbers are metrics, named by the command, at
the time that it ended; the dataset's seal and its recipe's hash are kept with it. The tracker's own files are in the
user's state folder. An outage never ends a command: what was not sent is sent by the next one.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from capstan.cluster.user_dirs import state_folder

if TYPE_CHECKING:
    from capstan.pipeline.config import Recipe

log = logging.getLogger(__name__)

Summary = Mapping[str, Any]

_FIELD: Final = "trackers"
_ODD: Final = re.compile(r"[^A-Za-z0-9_./ -]+")  # characters that MLflow does not take in a metric's name


def tracked(command: str, recipe: Recipe, run: Callable[[], Summary]) -> Summary:
    """Run a command, log its summary with the recipe's trackers, and return it.

    Raises MissingExtra before the command runs if the package of a tracker is not installed.
    """
    names = list(dict.fromkeys(recipe.trackers))
    if not names:
        return run()
    from capstan.training.monitoring.trackers import open_for, require

    require(names, _FIELD)
    summary = run()
    from capstan.pipeline.pack.job import content_recipe
    from capstan.training.monitoring.trackers.subject import Subject

    name, folder = _place(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    subject = Subject(folder, lambda: content_recipe(recipe) | {"recaption": recipe.recaption}, name)
    step = int(time.time())
    trackers = open_for(subject, step, names)
    trackers.scalars(step, dict(_numbers(summary, command)))
    trackers.notes(step, _notes(recipe))
    trackers.close()
    log.info("%s: %s logged as %s; their own files are in %s", ", ".join(names), command, name, folder)
    return summary


def _place(recipe: Recipe) -> tuple[str, Path]:
    """Return the name of the dataset's run, and the folder of the trackers' own files."""
    from capstan.pipeline.config import fingerprint
    from capstan.pipeline.storage import Storage

    local = Storage(recipe.dataset, recipe.storage).local_path()
    whole = str(local.absolute()) if local is not None else recipe.dataset.rstrip("/")
    name = whole.rpartition("/")[2] or "dataset"
    return name, state_folder() / "trackers" / f"{name}-{fingerprint(whole)}"


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a summary, named by their path; of the funnel, the rows left after each step."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield _ODD.sub("_", name), float(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(len(inner) if key == "quarantined" else inner, f"{name}/{key}")
    elif isinstance(value, list):
        for step in value:
            if isinstance(step, Mapping) and "step" in step and "left" in step:
                yield from _numbers(step["left"], f"{name}/{step['step']}")


def _notes(recipe: Recipe) -> dict[str, str]:
    """Return what identifies the dataset as it is now."""
    from capstan.pipeline.dataset.shards import MANIFEST
    from capstan.pipeline.secrets import public_url
    from capstan.pipeline.storage import Storage

    storage = Storage(recipe.dataset, recipe.storage)
    manifest = json.loads(storage.read(MANIFEST)) if storage.exists(MANIFEST) else {}
    told = {"dataset": public_url(recipe.dataset), "recipe_hash": manifest.get("recipe_hash")}
    told["dataset_seal"] = manifest.get("seal")
    return {name: str(value) for name, value in told.items() if value}
