"""From a recipe and a number of rows to the cost of every stage"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from capstan.cluster.cost.laws import (
    DUPLICATES,
    PART_BYTES,
    PLAN,
    PLAN_DRIVER,
    PRICES,
    RATES,
    SELECT,
    SELECT_BYTES,
    SHARD_OBJECTS,
    UNIT,
    UNIT_OBJECTS,
    UNIT_READS,
    Law,
)
from capstan.cluster.cost.training import samples_per_s
from capstan.cluster.doctor.estimates import image_bytes
from capstan.cluster.doctor.recipe import rows_of
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError

_HOUR: Final = 3600.0


@dataclass
class Stage:
    """What one stage takes, in all."""

    name: str
    core_s: float = 0.0
    gpu_s: float = 0.0
    driver_s: float = 0.0  # of one process, however large the cluster is
    scratch: float = 0.0  # bytes on that process's disk, while it runs
    objects: float = 0.0
    writes: float = 0.0
    reads: float = 0.0
    stored: float = 0.0  # bytes
    used: dict[str, Law] = field(default_factory=dict)

    def hours(self, cores: int, gpus: int) -> float:
        """Return how long it takes on a cluster: the longest of its cores', its GPUs' and its driver's hours."""
        if self.gpu_s and not gpus:
            raise RecipeError("--gpus", f"is 0, and the stage {self.name} needs a GPU", "say how many there are")
        return max(self.core_s / cores, self.gpu_s / max(gpus, 1), self.driver_s) / _HOUR


@dataclass(frozen=True)
class Plan:
    """A recipe's stages at a number of rows, on a cluster, at some prices."""

    rows: int
    cores: int
    gpus: int
    stages: list[Stage]
    prices: Mapping[str, Law]

    def summary(self) -> dict[str, Any]:
        """Return the lines that `capstan plan-cost` prints."""
        stored = sum(stage.stored for stage in self.stages)
        laws_used = {name: law for stage in self.stages for name, law in stage.used.items()}
        return {
            "rows": self.rows,
            "cores": self.cores,
            "gpus": self.gpus,
            "stages": [self._line(stage) for stage in self.stages],
            "hours": _rounded(sum(stage.hours(self.cores, self.gpus) for stage in self.stages)),
            "dollars": _rounded(sum(map(self._dollars, self.stages))),
            "dollars_a_month": _rounded(stored / 1e9 * self.prices["gb_month"].value),
            "figures": {
                name: f"{law.value:.3g} {law.unit}; {law.basis}: {law.source}"
                for name, law in {**laws_used, **self.prices}.items()
            },
        }

    def _line(self, stage: Stage) -> dict[str, Any]:
        line = {
            "stage": stage.name,
            "core_hours": _rounded(stage.core_s / _HOUR),
            "gpu_hours": _rounded(stage.gpu_s / _HOUR),
            "hours": _rounded(stage.hours(self.cores, self.gpus)),
            "scratch_gb": _rounded(stage.scratch / 1e9),
            "objects": round(stage.objects),
            "requests": round(stage.writes + stage.reads),
            "stored_gb": _rounded(stage.stored / 1e9),
            "dollars": _rounded(self._dollars(stage)),
        }
        bases = dict.fromkeys(law.basis for law in stage.used.values())
        return {name: value for name, value in line.items() if value} | {"basis": ", ".join(bases)}

    def _dollars(self, stage: Stage) -> float:
        price = {name: law.value for name, law in self.prices.items()}
        compute = (stage.core_s * price["core_hour"] + stage.gpu_s * price["gpu_hour"]) / _HOUR
        return compute + (stage.writes * price["put_1000"] + stage.reads * price["get_1000"]) / 1000


def plan(
    recipe: Recipe,
    *,
    rows: int | None = None,
    cores: int = 64,
    gpus: int = 8,
    rates: Mapping[str, float] | None = None,
    prices: Mapping[str, float] | None = None,
) -> Plan:
    """Return what `recipe` costs on a cluster of `cores` and `gpus`; `rates` and `prices` replace known figures.

    Raises RecipeError if the number of rows is not given and only reading the source would tell, and for names that
    are not known.
    """
    count = rows_of(recipe) if rows is None else rows
    if count is None:
        raise RecipeError("--rows", "only reading the source would tell", "say how many there are: --rows 1000000000")
    known = _replaced(RATES, rates or {}, "--rate")
    costs = _Costs(recipe, count, known)
    return Plan(count, cores, gpus, list(costs.stages()), _replaced(PRICES, prices or {}, "--price"))


def _replaced(known: Mapping[str, Law], given: Mapping[str, float], option: str) -> dict[str, Law]:
    units = {name: law.unit for name, law in known.items()}
    if option == "--rate":
        units["train"] = "samples/s a GPU"
    for name, value in given.items():
        if name not in units:
            raise RecipeError(option, f"{name} is not known", f"use one of {', '.join(units)}")
        if not value > 0:
            raise RecipeError(option, f"{name} is {value:g}", "give a number above 0")
    stated = {name: Law(value, units[name], "yours", option) for name, value in given.items()}
    return {**known, **stated}


class _Costs:
    """The stages of one recipe, each from the laws that it adds up."""

    def __init__(self, recipe: Recipe, rows: int, rates: Mapping[str, Law]) -> None:
        self.recipe, self.rows, self.rates = recipe, rows, rates
        of_urls = recipe.source is not None and recipe.source.image is None and recipe.source.format != "world"
        self.images = rows * (rates["kept"].value if of_urls else 1.0)
        self.units, self.shards = rows / recipe.unit.rows, self.images / recipe.shards.samples
        self.of_urls = of_urls

    def stages(self) -> Iterator[Stage]:
        recipe = self.recipe
        if recipe.source is not None:
            amounts = {"core_s": self.rows * PLAN.value, "driver_s": self.rows * PLAN_DRIVER.value}
            yield self._stage("plan", **amounts, used={"plan": PLAN, "plan_driver": PLAN_DRIVER})
            yield self._build()
        if recipe.score.clip is not None:
            yield self._on_gpus("score", "clip")
        if recipe.select or recipe.dedup.exact or recipe.dedup.perceptual is not None:
            yield self._select()
        if recipe.recaption is not None:
            yield self._on_gpus("recaption", "captions")
        yield from self._train()

    def _stage(self, name: str, *, used: Mapping[str, Law], **amounts: float) -> Stage:
        return Stage(name, used=dict(used), **amounts)

    def _build(self) -> Stage:
        image, copied = self.recipe.image, self.recipe.image.check == "header"
        small, large = (1 / self.rates[name].value for name in ("build_256", "build_512"))
        slope = (large - small) / (512**2 - 256**2)
        seconds = 1 / self.rates["build_copied"].value if copied else small + slope * (image.size**2 - 256**2)
        used = ["build_copied"] if copied else ["build_256", "build_512"]
        stored = self.images * image_bytes(self.recipe)
        copies = 2 if self.recipe.keep_staged else 1  # staged, and in shards
        objects = self.units * UNIT_OBJECTS.value + self.shards * SHARD_OBJECTS.value
        return self._stage(
            "build",
            core_s=self.images * max(seconds, small / 2),
            driver_s=self.units * UNIT.value,
            objects=objects,
            writes=objects + 2 * stored / PART_BYTES.value,
            reads=self.units * UNIT_READS.value,
            stored=copies * stored,
            used=self._rates(*used, *(["kept"] if self.of_urls else []))
            | {"unit": UNIT, "unit_objects": UNIT_OBJECTS, "shard_objects": SHARD_OBJECTS, "unit_reads": UNIT_READS},
        )

    def _rates(self, *names: str) -> dict[str, Law]:
        return {name: self.rates[name] for name in names}

    def _on_gpus(self, name: str, rate: str, factor: float = 1.0) -> Stage:
        """Return a stage in which CPUs decode images for a model on GPUs; `factor`: how much slower it is here."""
        return self._stage(
            name,
            gpu_s=self.images / self.rates[rate].value * factor,
            core_s=self.images / self.rates["decode"].value,
            driver_s=self.shards * UNIT.value,
            objects=self.shards,
            writes=self.shards * 2,
            reads=self.shards * 3,
            used=self._rates(rate, "decode") | {"unit": UNIT},
        )

    def _select(self) -> Stage:
        near = self.recipe.dedup.perceptual is not None
        seconds = SELECT.value + (DUPLICATES.value if near else 0)
        used = {"select": SELECT, "select_bytes": SELECT_BYTES} | ({"duplicates": DUPLICATES} if near else {})
        return self._stage("select", driver_s=self.rows * seconds, scratch=self.rows * SELECT_BYTES.value, used=used)

    def _train(self) -> Iterator[Stage]:
        if self.recipe.train is None:
            return
        from capstan.training.config import TrainConfig

        train = TrainConfig.from_recipe(self.recipe)
        if train.data.latents is not None:
            yield self._on_gpus("encode", "latents", factor=(self.recipe.image.size / 256) ** 2)
        rate, used = samples_per_s(self.recipe, train, self.rates)
        yield self._stage("train", gpu_s=train.steps * train.batch / rate, used=used)


def _rounded(value: float) -> float:
    """Round to three digits: more would pretend.

    >>> _rounded(12345.6), _rounded(0.01234)
    (12300.0, 0.0123)
    """
    return float(f"{value:.3g}")
