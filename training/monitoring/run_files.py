"""A run folder, perhaps of a stranger and perhaps still training → its records, grids and state

Nothing in it is trusted: lines that are not records are skipped and counted, and files are named by patterns only.
Loads neither torch nor the run's model.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.storage import Storage

TRAINING, FINISHED, STOPPED = "training", "finished", "stopped"
_GRID: Final = re.compile(r"samples/step-(\d{6,12})\.png")
_CHECKPOINT: Final = re.compile(r"checkpoints/step-(\d{6,12})/.*")
_HINT: Final = "restore the run folder from a copy"
_DEPTH: Final = 3  # folders of runs within folders, as experiments make them
_MOST_RUNS: Final = 500

Record = dict[str, Any]


class JsonLines:
    """A growing file of JSON objects with a `step`; `read` reads only what was added, unless the file was rewritten."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._offset, self._last = 0, b""
        self.records: list[Record] = []
        self.unreadable = 0

    def read(self) -> list[Record]:
        """Return all records in the file; a line that is not complete yet is left for the next time."""
        try:
            size = self._storage.size(self._name)
        except FileNotFoundError:
            self._restart()
            return self.records
        before = self._offset - len(self._last)
        if size < self._offset or (self._last and self._range(before, self._offset) != self._last):
            self._restart()  # a run that resumed from a checkpoint has cut its log
        if size > self._offset:
            whole = self._range(self._offset, size).rpartition(b"\n")[0]
            lines = whole.split(b"\n") if whole else []
            for line in lines:
                self._add(line)
            if lines:
                self._offset += len(whole) + 1
                self._last = lines[-1] + b"\n"
        return self.records

    def _range(self, start: int, stop: int) -> bytes:
        return self._storage.read_range(self._name, start, stop)

    def _restart(self) -> None:
        self._offset, self._last, self.records, self.unreadable = 0, b"", [], 0

    def _add(self, line: bytes) -> None:
        record = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            self.records.append(record)
        elif line.strip():
            self.unreadable += 1


class RunFiles:
    """A run folder. Raises RecipeError if it is not one, DamagedFile if its recipe cannot be read."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        if not is_run(storage):
            raise RecipeError(storage.field, f"no training run at {storage.url}", "name the folder of `train.run`")
        content = storage.read_json("recipe.json", _HINT)
        self.recipe: Record = content["recipe"]
        self.train: Record = self.recipe["train"]
        self.versions: Mapping[str, Any] = _object(content.get("versions"))
        self._log, self._evaluations = JsonLines(storage, "log.jsonl"), JsonLines(storage, "evaluations.jsonl")
        self.refresh()

    def refresh(self) -> None:
        """Read what was written since."""
        self.records, self.evaluations = self._log.read(), self._evaluations.read()
        self.unreadable = self._log.unreadable + self._evaluations.unreadable
        names = [*self.storage.names("samples"), *self.storage.names("checkpoints")]
        self.grids = {int(found[1]): name for name in names if (found := _GRID.fullmatch(name))}
        self.checkpoints = sorted({int(found[1]) for name in names if (found := _CHECKPOINT.fullmatch(name))})
        self.summary = _json_object(self.storage, "finished.json")
        self.best = _json_object(self.storage, "best.json")

    @property
    def steps(self) -> int:
        """The steps that the recipe asks for."""
        return int(_number(self.train.get("steps")) or 0)

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def state(self) -> str:
        """Whether it is training now, as far as this machine knows; has finished; or was stopped."""
        folder = self.storage.local_path()
        if folder is not None and _is_locked(folder / "lock"):
            return TRAINING
        return FINISHED if self.summary else STOPPED

    @property
    def prompts(self) -> str:
        """A hash of what its grids show: runs with the same one can be compared image by image."""
        samples = _object(_object(self.train.get("watch")).get("samples"))
        given = samples.get("prompts") or [self.recipe.get("dataset"), samples.get("count"), self.train.get("data")]
        return fingerprint(given)

    @property
    def last(self) -> Record:
        return self.records[-1] if self.records else {}

    def last_of(self, name: str) -> float | None:
        """Return the newest finite number of a measure in the log."""
        found = (_number(record.get(name)) for record in reversed(self.records))
        return next((value for value in found if value is not None), None)

    def measures(self) -> dict[str, float]:
        """Return the finite measures of the newest evaluation."""
        return dict(_flat(_object(self.evaluations[-1].get("measures")))) if self.evaluations else {}

    def seconds(self) -> float:
        """Return the time that its steps took, by their rates; sampling and evaluation are not counted."""
        batch, total, before = _number(self.train.get("batch")) or 0, 0.0, 0
        for record in self.records:
            if rate := _number(record.get("images_per_s")):
                total += max(record["step"] - before, 0) * batch / rate
            before = record["step"]
        return total

    def flops(self) -> float:
        """Return the number of floating-point operations of its steps; 0 if they were not counted."""
        batch, total, before = _number(self.train.get("batch")) or 0, 0.0, 0
        for record in self.records:
            rate, flops = _number(record.get("images_per_s")), _number(record.get("flops_per_s"))
            if rate and flops:
                total += flops * max(record["step"] - before, 0) * batch / rate
            before = record["step"]
        return total

    def engine(self) -> str:
        """Return what the log says of engine and devices, or ""."""
        try:
            lines = self.storage.read("train.log").decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return ""
        found = [line.partition(" engine: ")[2] for line in lines if " engine: " in line]
        return found[-1] if found else ""

    def series(self, most: int = 600) -> dict[str, dict[str, list[float]]]:
        """Return measure → {x: steps, y: values}, at most `most` points each, means of neighbours where there are more.

        Nested measures are named group/part, e.g. blend/original and loss_by_time/0.00-0.10.
        """
        columns: dict[str, tuple[list[float], list[float]]] = {}
        for record in self.records:
            for name, value in _flat(record):
                if name == "samples_per_s" and "images_per_s" in record:  # one number, by two names
                    continue
                steps, values = columns.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
        for record in self.evaluations:
            for name, value in _flat(_object(record.get("measures"))):
                steps, values = columns.setdefault(f"evaluation/{name}", ([], []))
                steps.append(record["step"])
                values.append(value)
        return {name: dict(zip("xy", thinned(*column, most), strict=True)) for name, column in sorted(columns.items())}


def thinned(steps: Sequence[float], values: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """Return a curve of at most `most` points: each the mean of its neighbours, at the last one's step.

    >>> thinned([1, 2, 3, 4], [1.0, 3.0, 5.0, 7.0], 2)
    ([2, 4], [2.0, 6.0])
    """
    size = -(-len(steps) // most) if most else 1
    if size <= 1:
        return list(steps), list(values)
    parts = [slice(start, start + size) for start in range(0, len(steps), size)]
    return [steps[part][-1] for part in parts], [math.fsum(values[part]) / len(values[part]) for part in parts]


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Return the exponential moving average, corrected for its start as Adam's moments are (Kingma and Ba 2015).

    >>> [round(value, 3) for value in smoothed([1.0, 3.0], 0.5)]
    [1.0, 2.333]
    """
    total, found = 0.0, []
    for count, value in enumerate(values, 1):
        total = weight * total + (1 - weight) * value
        found.append(total / (1 - weight**count) if weight < 1 else value)
    return found


def is_run(storage: Storage) -> bool:
    """Return whether a folder holds a training run; caption layers and encoders have a recipe.json, too."""
    content = _json_object(storage, "recipe.json")
    recipe = content.get("recipe")
    return (
        isinstance(content.get("identity"), dict) and isinstance(recipe, dict) and isinstance(recipe.get("train"), dict)
    )


def find_runs(storage: Storage, known: Collection[str] = ()) -> list[RunFiles]:
    """Return the runs at or below a folder that are not `known` by name, sorted; links are not followed."""
    if is_run(storage):
        name = storage.url.rstrip("/").rpartition("/")[2] or storage.url
        return [] if name in known else [RunFiles(storage, name)]
    root = storage.local_path()
    if root is None:
        listed = (name.removesuffix("/recipe.json") for name in storage.names() if name.endswith("/recipe.json"))
        names = [name for name in listed if name.count("/") < _DEPTH]
    else:
        names = list(_folders(root))
    runs = []
    for name in sorted(set(names) - set(known)):
        folder = storage.folder(name)
        if is_run(folder):
            runs.append(RunFiles(folder, name))
        if len(runs) + len(known) >= _MOST_RUNS:
            break
    return runs


def _folders(root: Path) -> Iterable[str]:
    """Yield the folders below `root` that have a recipe.json, not looking into runs, datasets and hidden folders."""
    waiting = [root] if root.is_dir() else []
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
                continue
            if (path / "recipe.json").is_file():
                yield str(path.relative_to(root))
            elif len(path.relative_to(root).parts) < _DEPTH and not (path / "dataset.json").exists():
                waiting.append(path)


def _json_object(storage: Storage, name: str) -> Record:
    """Return a JSON object of the run; {} if it is not there or is none."""
    try:
        return storage.read_json(name, _HINT)
    except (FileNotFoundError, DamagedFile):
        return {}


def _object(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    with contextlib.suppress(OverflowError):
        return value if math.isfinite(value) else None
    return None


def _flat(record: Record) -> Iterable[tuple[str, float]]:
    """Yield the finite numbers of a record but its step; those of an object as name/part."""
    for name, value in record.items():
        for part, inner in value.items() if isinstance(value, dict) else (("", value),):
            if name != "step" and (number := _number(inner)) is not None:
                yield f"{name}/{part}" if part else name, number


def _is_locked(lock: Path) -> bool:
    """Return whether a process of this machine holds the run's lock; it is not held for longer than the look takes."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
