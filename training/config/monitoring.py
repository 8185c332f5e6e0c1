"""The recipe's section `train.watch`: what is seen of a run while it trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=1)]
Measure = Literal["oracle", "clip", "fid"]


class Samples(Section):
    """A grid of images with the averaged weights, always from the same prompts and noise."""

    every: Positive = 1000  # steps; the last one too
    prompts: Annotated[list[str], Field(min_length=1)] | None = None  # null: of unseen scenes, or of held-out samples
    count: Positive = 8  # of them, where `prompts` is null
    steps: Positive | None = None  # null: as train.diffusion.sampling says
    guidance: Guidance | None = None


class ClipSettings(Section):
    """The CLIP that judges: a name of open_clip with a tag or a file, or a folder with its weights."""

    model: str
    pretrained: str | None = None


class Fid(Section):
    """The network whose features are compared."""

    features: str  # a file: torch-fidelity's Inception (.pth), or any TorchScript network of images → features (.pt)


class Evaluate(Section):
    """Images drawn from prompts that the run does not train on, measured."""

    every: Positive = 5000  # steps; the last one too
    count: Annotated[int, Field(ge=2)] = 1000  # images, shared among the workers
    measures: Annotated[list[Measure], Field(min_length=1)] = ["clip"]  # noqa: RUF012 - pydantic copies it
    batch: Positive = 16  # images drawn at once on each worker
    steps: Positive | None = None
    guidance: Guidance | None = None
    clip: ClipSettings | None = None
    fid: Fid | None = None

    @model_validator(mode="after")
    def _measures_have_what_they_need(self) -> Evaluate:
        for name, example in (("clip", "{model: ./clip}"), ("fid", "{features: ./inception.pth}")):
            if name in self.measures and getattr(self, name) is None:
                raise ValueError(f"measure {name} needs {name}: {example}")
        return self

    def terms(self, measure: str) -> dict[str, Any]:
        """What a value of `measure` depends on: values of other terms do not compare.

        >>> Evaluate(count=100, measures=["fid"], fid=Fid(features="a.pth")).terms("fid")
        {'count': 100, 'steps': None, 'guidance': None, 'judge': {'features': 'a.pth'}}
        """
        judge = {"clip": self.clip, "fid": self.fid}.get(measure)
        told = None if judge is None else judge.model_dump(mode="json")
        return {"count": self.count, "steps": self.steps, "guidance": self.guidance, "judge": told}


class Best(Section):
    """Which evaluation's state is kept, whatever train.checkpoint.keep says."""

    measure: str  # as evaluations.jsonl names it: clip, fid, colour_shape, ...
    mode: Literal["max", "min"] | None = None  # null: min for fid, else max

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        mode = self.mode or ("min" if self.measure == "fid" else "max")
        return 1 if mode == "max" else -1


class Watch(Section):
    """What is seen of a run."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]  # noqa: RUF012
    bands: Positive = 10  # of the loss by timestep
    peak_tflops: Annotated[float, Field(gt=0)] | None = None  # of one device, for MFU; null: as known of the GPU
    samples: Samples | None = None
    evaluate: Evaluate | None = None
    best: Best | None = None

    @model_validator(mode="after")
    def _best_is_measured(self) -> Watch:
        if self.best is not None:
            measured = [name for m in (self.evaluate.measures if self.evaluate else []) for name in recorded(m)]
            if self.best.measure not in measured:
                have = f"one of {', '.join(measured)}" if measured else "add evaluate: {measures: [...]}"
                raise ValueError(f"best.measure {self.best.measure!r} is not measured; {have}")
        return self

    def draws(self) -> list[str]:
        """The keys that draw images, and so need a model that does."""
        return [name for name, value in (("samples", self.samples), ("evaluate", self.evaluate)) if value is not None]


def recorded(measure: Measure) -> tuple[str, ...]:
    """What a measure puts into the record of an evaluation."""
    if measure != "oracle":
        return (measure,)
    from capstan.pipeline.world.oracle import MEASURES  # loads OpenCV

    return MEASURES


def measures_in(text: str) -> list[Measure]:
    """Names by commas. Raises RecipeError for one that there is not.

    >>> measures_in("oracle, clip")
    ['oracle', 'clip']
    """
    known = get_args(Measure)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RecipeError("--measures", f"no measure {name!r}", f"name some of {', '.join(known)}, by commas")
    return [measure for name in names for measure in known if measure == name]


def flat(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers under one name each, as trackers take them; what is inside another goes by a slash.

    >>> flat({"step": 3, "loss": 0.5, "blend": {"original": 1.0}, "count": None})
    {'loss': 0.5, 'blend/original': 1.0}
    """
    values: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            values |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif name != "step" and isinstance(value, int | float):
            values[name] = float(value)
    return values
