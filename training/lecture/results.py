"""Measurements of a lecture → means with 95% intervals by system, curves, costs, and sentences"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from capstan.pipeline.world import oracle
from capstan.training.experiment.intervals import Interval, interval
from capstan.training.lecture.config import System
from capstan.training.lecture.measure import FIRST_STAGE

MEASURES: Final = ("colour_shape", "count", "relation", "background", "size", "followed_strict")
PRIMARY: Final = "followed_strict"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What was found of one system."""

    system: System
    kind: str
    seeds: list[int]
    minutes: float  # of the lecture's clock, mean over seeds
    cpu_minutes: float
    wall_minutes: float
    steps: int  # of the last run
    parameters: int
    seconds_per_image: float
    values: dict[str, Interval]  # measure → at the last point; psnr too, of a first stage
    chance: dict[str, float]
    ceiling: dict[str, float]
    curves: dict[str, list[tuple[float, Interval]]]  # measure → (minutes, value)
    others: dict[str, float]

    @property
    def is_first_stage(self) -> bool:
        return self.kind == FIRST_STAGE

    def facts(self) -> dict[str, Any]:
        """Return everything as plain data; intervals are [mean, low, high]."""
        whole = {name: getattr(self, name) for name in ("kind", "seeds", "minutes", "cpu_minutes", "wall_minutes")}
        whole |= {name: getattr(self, name) for name in ("steps", "parameters", "seconds_per_image", "others")}
        whole |= {name: _plain(getattr(self, name)) for name in ("chance", "ceiling")}
        whole["values"] = {name: value.facts() for name, value in self.values.items()}
        whole["curves"] = {n: [[round(x, 3), *v.facts()] for x, v in line] for n, line in self.curves.items()}
        return {"name": self.system.name, "paper": self.system.paper, "claim": self.system.claim, **whole}


def found(system: System, runs: Mapping[int, Sequence[Facts]], clock: str, draws: int) -> Found:
    """Return what was found of a system, from seed → its measurements by point, all of the same number."""
    seeds, points = sorted(runs), len(next(iter(runs.values())))
    last = [runs[seed][-1] for seed in seeds]
    psnr = {"psnr": [facts["psnr"] for facts in last]} if "psnr" in last[0] else {}
    values = {name: [facts["values"][name] for facts in last] for name in MEASURES} | psnr
    cpu, wall = (_mean([facts[name] for facts in last]) / 60 for name in ("cpu_s", "wall_s"))
    curves = {}
    for name in values:
        at = [[runs[seed][point] for seed in seeds] for point in range(points)]
        curves[name] = [(_minutes(now, clock), _interval([_of(facts, name) for facts in now], draws)) for now in at]
    return Found(
        system=system,
        kind=str(last[0]["kind"]),
        seeds=seeds,
        minutes=round(_minutes(last, clock), 2),
        cpu_minutes=round(cpu, 2),
        wall_minutes=round(wall, 2),
        steps=round(_mean([facts["steps"] for facts in last])),
        parameters=int(last[0]["parameters"]),
        seconds_per_image=round(_mean([facts["seconds"] / facts["pictures"] for facts in last]), 4),
        values={name: _interval(rows, draws) for name, rows in values.items()},
        chance={name: _average(last, "chance", name) for name in MEASURES if last[0]["chance"]},
        ceiling={name: _average(last, "ceiling", name) for name in MEASURES if last[0]["ceiling"]},
        curves=curves,
        others={name: round(_mean([facts["others"][name] for facts in last]), 4) for name in last[0].get("others", {})},
    )


def sentence(one: Found) -> str:
    """Return what is seen of a system, in words."""
    if one.is_first_stage:
        held = one.values["colour_shape"]
        text = f"PSNR {one.values['psnr'].mean:.1f} dB; {held.mean:.0%} of coloured shapes survive"
        return text + "".join(f"; {name.replace('_', ' ')} {value:g}" for name, value in one.others.items()) + "."
    value = one.values["colour_shape"]
    above = [oracle.title(name) for name in MEASURES if one.values[name].low > one.chance.get(name, math.nan)]
    at = [oracle.title(name) for name in MEASURES if oracle.title(name) not in above]
    text = f"{value.mean:.0%} of coloured shapes, by chance {one.chance['colour_shape']:.0%}. "
    text += f"Above chance: {', '.join(above) or 'nothing'}"
    return text + (f"; not above it: {', '.join(at)}." if at else ".")


def _of(facts: Facts, name: str) -> list[float | None]:
    return list(facts["psnr"] if name == "psnr" else facts["values"][name])


def _interval(rows: Sequence[Sequence[float | None]], draws: int) -> Interval:
    return interval(np.array(rows, dtype=np.float64), draws)


def _minutes(facts: Sequence[Facts], clock: str) -> float:
    return _mean([one[f"{clock}_s"] for one in facts]) / 60


def _average(facts: Sequence[Facts], kind: str, name: str) -> float:
    values = [value for one in facts for value in one[kind][name] if value is not None]
    return round(_mean(values), 4) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
