"""Measurements → means, intervals and differences by arm, and result sentences."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from capstan.pipeline.storage import Storage
from capstan.pipeline.world import prompt_score
from capstan.training.config import TrainConfig
from capstan.training.experiment.arms import Trial, trial_folder
from capstan.training.experiment.config import MAIN, STANDARD, ExperimentConfig
from capstan.training.experiment.intervals import Floats, Interval, difference, interval
from capstan.training.experiment.measure import CLIP_MEASURES, Measurements
from capstan.training.experiment.prompts import SETS, UPSAMPLED

# The measure that ranks arms, chosen before anything was measured; the others are shown next to it.
PRIMARY: Final = ("followed", "clip_mean")  # the first one available: on the captioned world; on other datasets

Numbers = dict[str, dict[str, dict[str, Interval]]]  # set → measure → arm


@dataclass(frozen=True)
class Difference:
    """a − b on the same prompts and seeds."""

    a: str
    b: str
    value: Interval


@dataclass(frozen=True)
class Results:
    """The numbers of an experiment; arms in the recipe's order, only those with a finished run."""

    primary: str
    points: list[int]
    seeds: dict[str, list[int]]  # arm → seeds of finished runs
    prompts: int  # per set
    table: Numbers  # at the last point
    differences: dict[str, dict[str, list[Difference]]]  # set → measure → all pairs of arms, at the last point
    curves: dict[str, dict[str, dict[str, list[tuple[int, Interval]]]]]  # set → measure → arm → (step, …)
    expanding: dict[str, dict[str, Interval]]  # measure → arm → with expanded prompts − without
    references: dict[str, dict[str, dict[str, float | None]]]  # truth, chance → set → measure
    captions: dict[str, dict[str, float | None]]  # slot → attribute → share stated correctly, on the captioned world
    asked: dict[str, dict[str, float]]  # set → what its prompts are like (caption_accuracy.prompt_statistics)
    blends: dict[str, dict[str, Any]]  # arm → {layer, asked, drawn}
    cost: dict[str, dict[str, float]]  # arm → sums over all its runs
    found: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        return list(self.seeds)

    def facts(self) -> dict[str, Any]:
        """Return the results as plain data; intervals are [mean, low, high]."""
        facts: dict[str, Any] = _plain(asdict(self, dict_factory=_keep))
        return facts


def gather(storage: Storage, config: ExperimentConfig, train: TrainConfig, layers: Mapping[str, str | None]) -> Results:
    """Read all measurements of an experiment's folder. Arms without a finished run are left out."""
    measurements, points = Measurements(storage), config.points(train)
    read = {
        (arm, seed, point): measurements.read(Trial(arm, seed).name, point)
        for arm in config.arms
        for seed in config.seeds
        for point in points
    }
    seeds = {arm: [seed for seed in config.seeds if read[arm, seed, points[-1]]] for arm in config.arms}
    seeds = {arm: finished for arm, finished in seeds.items() if finished}
    values = _Values(read, seeds)
    names = values.measures(points[-1])
    table = {
        part: {m: {arm: interval(values.of(part, m, arm, points[-1]), config.draws) for arm in seeds} for m in measures}
        for part, measures in names.items()
    }
    differences = {
        part: {m: values.differences(part, m, points[-1], config.draws) for m in measures}
        for part, measures in names.items()
    }
    primary = next((name for name in PRIMARY if name in names.get(SETS[0], [])), PRIMARY[0])
    results = Results(
        primary=primary,
        points=points,
        seeds=seeds,
        prompts=config.prompts,
        table=table,
        differences=differences,
        curves=_curves(values, names, seeds, points, config.draws),
        expanding=_expanding(values, names, seeds, points[-1], config.draws),
        references=_references(storage),
        captions=json.loads(storage.read("captions.json")),
        asked=json.loads(storage.read("prompts.json")),
        blends={arm: _blend(train.folder, config, arm, seeds[arm], layers[arm]) for arm in seeds},
        cost={arm: _cost(train, arm, seeds[arm], read, points) for arm in seeds},
    )
    results.found.extend(sentences(results))
    return results


class _Values:
    """Measurements by (arm, seed, point), as matrices [seeds, prompts]."""

    def __init__(self, read: Mapping[tuple[str, int, int], dict[str, Any] | None], seeds: dict[str, list[int]]) -> None:
        self._read, self._seeds = read, seeds

    def measures(self, point: int) -> dict[str, list[str]]:
        """Return set → measures that are defined for some of its prompts."""
        names: dict[str, list[str]] = {}
        for arm, seeds in self._seeds.items():
            for part, columns in self._entry(arm, seeds[0], point).items():
                defined = [name for name, column in columns.items() if any(v is not None for v in column)]
                names[part] = [
                    n for n in (*prompt_score.MEASURES, *CLIP_MEASURES) if n in {*names.get(part, []), *defined}
                ]
        return names

    def of(self, part: str, measure: str, arm: str, point: int, seeds: Sequence[int] | None = None) -> Floats:
        """Return values [S, P], nan where the measure is not defined."""
        rows = [self._entry(arm, seed, point)[part][measure] for seed in (self._seeds[arm] if seeds is None else seeds)]
        return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float64)

    def differences(self, part: str, measure: str, point: int, draws: int) -> list[Difference]:
        """Return the differences of all pairs, later arm minus earlier one, on the seeds that both have."""
        found = []
        for b, a in itertools.combinations(self._seeds, 2):
            if both := [seed for seed in self._seeds[a] if seed in self._seeds[b]]:
                more, less = (self.of(part, measure, arm, point, both) for arm in (a, b))
                found.append(Difference(a, b, difference(more, less, draws)))
        return found

    def _entry(self, arm: str, seed: int, point: int) -> dict[str, dict[str, list[float | None]]]:
        entry = self._read[arm, seed, point]
        assert entry is not None
        values: dict[str, dict[str, list[float | None]]] = entry["values"]
        return values


def _curves(
    values: _Values, names: dict[str, list[str]], seeds: dict[str, list[int]], points: list[int], draws: int
) -> dict[str, dict[str, dict[str, list[tuple[int, Interval]]]]]:
    return {
        part: {
            m: {arm: [(p, interval(values.of(part, m, arm, p), draws)) for p in points] for arm in seeds}
            for m in measures
        }
        for part, measures in names.items()
        if part in SETS
    }


def _expanding(
    values: _Values, names: dict[str, list[str]], seeds: dict[str, list[int]], point: int, draws: int
) -> dict[str, dict[str, Interval]]:
    """Return measure → arm → difference that expanding prompts makes."""
    return {
        m: {
            arm: difference(values.of(UPSAMPLED, m, arm, point), values.of(SETS[0], m, arm, point), draws)
            for arm in seeds
        }
        for m in names.get(UPSAMPLED, [])
        if m in names[SETS[0]]
    }


def _references(storage: Storage) -> dict[str, dict[str, dict[str, float | None]]]:
    whole = json.loads(storage.read("references.json"))
    return {
        name: {part: {m: _mean(column) for m, column in columns.items()} for part, columns in sets.items()}
        for name, sets in whole.items()
        if sets
    }


def _mean(column: Sequence[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _blend(folder: Path, config: ExperimentConfig, arm: str, seeds: list[int], layer: str | None) -> dict[str, Any]:
    """Return the requested blend and the one actually drawn, over all seeds."""
    drawn = [_records(folder, Trial(arm, seed))[-1]["blend"] for seed in seeds]
    slots = sorted({slot for blend in drawn for slot in blend})
    means = {slot: round(sum(blend.get(slot, 0.0) for blend in drawn) / len(drawn), 4) for slot in slots}
    return {"layer": layer, "asked": config.arms[arm].shares, "drawn": means}


def _cost(
    train: TrainConfig, arm: str, seeds: list[int], read: Mapping[tuple[str, int, int], Any], points: list[int]
) -> dict[str, float]:
    """Return seconds in training steps (without start-up), images seen; seconds and images of measuring."""
    seconds, images = 0.0, 0
    for seed in seeds:
        before = 0
        for record in _records(train.folder, Trial(arm, seed)):
            seconds += (record["samples"] - before) / record["images_per_s"]
            before = record["samples"]
        images += before
    measured = [read[arm, seed, point] for seed in seeds for point in points]
    return {
        "runs": len(seeds),
        "training_s": round(seconds, 1),
        "images": images,
        "measuring_s": round(sum(entry["seconds"] for entry in measured), 1),
        "pictures": sum(entry["pictures"] for entry in measured),
    }


def _records(folder: Path, trial: Trial) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial_folder(folder, trial) / "log.jsonl").read_text().splitlines()]


def _keep(items: list[tuple[str, Any]]) -> Any:
    """Return an `Interval` as a list, any other dataclass as a mapping."""
    named = dict(items)
    return Interval(**named).facts() if named.keys() == {"mean", "low", "high"} else named


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


# Words ---------------------------------------------------------------------------------------------------------------

_SAYS: Final = {
    "followed": "the share of a prompt's statements that the image satisfies",
    "clip_mean": "the CLIP score over sentences",
}
_BLENDS: Final = tuple(f"descriptive{percent}" for percent in (65, 80, 90, 95, 100))


def sentences(results: Results) -> list[str]:
    """Return the findings per set of prompts by the primary measure: ranking, and which differences exclude 0."""
    if len(results.arms) < 2:
        return ["Fewer than two arms have been measured, so nothing can be compared yet."]
    lines = [f"The measure is {_SAYS[results.primary]}; intervals are 95%, over prompts and {_seeds(results)}."]
    for part in SETS:
        values = results.table[part][results.primary]
        lines.append(f"On {part} prompts: {ranking(values)}.")
        find = _finder(results, part)
        lines += _claim(part, values, find)
        lines += _blended(part, values, find)
        if (gap := find("truth95", "descriptive95")) is not None:
            lines.append(f"True descriptions instead of the captioner's: {_by(gap)} on {part} prompts.")
        if (strict := results.table[part].get(f"{results.primary}_strict")) is not None:
            lines.append(f"If things that the prompt does not mention count against an image: {ranking(strict)}.")
    for arm, change in results.expanding.get(results.primary, {}).items():
        if arm in MAIN:
            lines.append(f"Expanding original prompts: {_by(change)} for {arm}.")
    lines += _captions(results.captions)
    if left := [arm for arm in STANDARD if arm not in results.arms]:
        lines.append(f"Not run here: {', '.join(left)}.")
    return lines


def _captions(stated: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return the accuracy of the two kinds of synthetic captions, by which arms differ too."""
    shares = [
        f"{100 * share:.0f}% of {slot} ones"
        for slot in ("short", "descriptive")
        if (share := stated.get(slot, {}).get("colour_shape")) is not None
    ]
    if len(shares) < 2:
        return []
    return [
        f"The captions are a captioner's and have errors: coloured shapes are right in {' and in '.join(shares)}. "
        "Arms with short and with descriptive captions differ in accuracy as well as in length."
    ]


def ranking(values: Mapping[str, Interval]) -> str:
    """Return the arms from best to worst, with their means; equal rounded means are joined by “=”."""
    arms = sorted(values, key=lambda arm: -values[arm].mean)
    text = ""
    for before, arm in zip([None, *arms], arms, strict=False):
        mean = _number(values[arm])
        if before is not None:
            text += " = " if mean == _number(values[before]) else " > "
        text += f"{arm} {mean}"
    return text


def _seeds(results: Results) -> str:
    counts = sorted({len(seeds) for seeds in results.seeds.values()})
    return f"{'–'.join(map(str, counts))} seed{'s' if counts[-1] > 1 else ''}"


def _claim(part: str, values: Mapping[str, Interval], find: Callable[[str, str], Interval | None]) -> list[str]:
    """Test the paper's claim: descriptive captions beat short ones, and short ones the web's."""
    if not all(arm in values for arm in MAIN):
        return []
    pairs = [("short95", "original"), ("descriptive95", "short95"), ("descriptive95", "original")]
    steps = [(a, b, gap) for a, b in pairs if (gap := find(a, b)) is not None]
    listed = "; ".join(f"{a} − {b} {_by(gap)}" for a, b, gap in steps)
    rising = all(values[a].mean < values[b].mean for a, b in itertools.pairwise(MAIN))
    sure = [gap.low > 0 for _, _, gap in steps]
    order = " < ".join(MAIN)
    if rising and len(steps) == len(pairs) and all(sure):
        verdict = f"The paper's order, {order}, appears on {part} prompts, and every difference excludes 0"
    elif rising:
        verdict = (
            f"The paper's order, {order}, appears on {part} prompts in the means, but not every difference excludes 0"
        )
    else:
        verdict = f"The paper's order, {order}, does not appear on {part} prompts"
    return [f"{verdict}: {listed}."]


def _blended(part: str, values: Mapping[str, Interval], find: Callable[[str, str], Interval | None]) -> list[str]:
    """Test the paper's claim: the more descriptive captions, the better."""
    there = [arm for arm in _BLENDS if arm in values]
    if len(there) < 2:
        return []
    best = max(there, key=lambda arm: values[arm].mean)
    listed = ", ".join(f"{a} − {b} {_by(gap)}" for b, a in itertools.pairwise(there) if (gap := find(a, b)) is not None)
    rising = all(values[a].mean <= values[b].mean for a, b in itertools.pairwise(there))
    how = "rises with the share of descriptive captions, as in the paper" if rising else f"is highest for {best}"
    return [f"Among blends the measure {how} on {part} prompts: {listed}."]


def _finder(results: Results, part: str) -> Callable[[str, str], Interval | None]:
    """Return a function that returns a − b, in whichever order the recipe lists them."""
    known = {(d.a, d.b): d.value for d in results.differences[part][results.primary]}

    def find(a: str, b: str) -> Interval | None:
        if (a, b) in known:
            return known[a, b]
        reverse = known.get((b, a))
        return None if reverse is None else Interval(-reverse.mean, -reverse.high, -reverse.low)

    return find


def _number(value: Interval) -> str:
    return f"{value.mean:.3g}" if abs(value.mean) >= 10 else f"{value.mean:.3f}"


def _by(value: Interval) -> str:
    """Return a difference in words.

    >>> _by(Interval(0.1, -0.05, 0.25))
    '+0.100 [−0.050, +0.250], which includes 0'
    """
    low, high = (f"{v:+.3f}".replace("-", "−") for v in (value.low, value.high))
    middle = f"{value.mean:+.3f}".replace("-", "−")
    if math.isnan(value.low):
        return f"{middle} (no interval)"
    return f"{middle} [{low}, {high}], which {'excludes' if value.excludes_zero else 'includes'} 0"
