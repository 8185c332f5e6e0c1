"""The recipe's section `train.watch`: trackers, sample grids, evaluations"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
Guidance = Annotated[float, Field(ge=1)]
Measure = Literal["oracle", "clip", "fid", "kid", "cmmd", "world", "layout", "consistency", "fad"]
_LOWER_IS_BETTER = ("fid", "fad", "kid", "kid_std", "cmmd", "background_tv", "colours_tv")
_INCEPTION_FEATURES = 2048  # FID of no more images than features is mostly bias


class Samples(Section):
    """A grid of images from the averaged weights, always with the same prompts and noise."""

    every: Positive = 1000
    """Steps from one grid to the next; one is also made after the last step."""
    prompts: Annotated[list[str], Field(min_length=1)] | None = None
    """The prompts; null: those of unseen scenes or held-out samples."""
    count: Positive = 8
    """Number of prompts if `prompts` is null."""
    steps: Positive | None = None
    """Sampling steps; null: train.diffusion.sampling."""
    guidance: Guidance | None = None
    """Guidance scale; null: train.diffusion.sampling."""


class ClipSettings(Section):
    """The judging CLIP: an open_clip name with a tag or a file, or a folder with its weights."""

    model: str
    """An open_clip name, or a folder with its weights."""
    pretrained: str | None = None
    """Checkpoint file or open_clip tag; null: the folder's own weights."""


class Fid(Section):
    """The feature network of FID and KID."""

    features: str
    """File of the feature network: torch-fidelity's Inception (.pth, .safetensors, or .pt with trust_torchscript); or
    open_nsfw. Of clips and sounds: a network of those (.pt)."""
    trust_torchscript: bool = False
    """Whether to run the program in a .pt file, which can do anything that you can."""


class Kid(Section):
    """Subsets of images over which KID is the mean."""

    subsets: Annotated[int, Field(ge=2)] = 100
    """Number of subsets."""
    size: Annotated[int, Field(ge=2)] | None = None
    """Images of each subset; null: half of all, at most 1000."""


class Evaluate(Section):
    """Metrics of images generated from prompts that the run does not train on."""

    every: Positive = 5000
    """Steps from one evaluation to the next; one is also made after the last step."""
    count: Annotated[int, Field(ge=2)] = 1000
    """Number of generated images, divided among the workers."""
    measures: Annotated[list[Measure], Field(min_length=1)] | None = None
    """Metrics to compute; null: those that the networks below allow."""
    batch: Positive = 16
    """Images that each worker generates at once."""
    steps: Positive | None = None
    """Sampling steps of the generated images; null: train.diffusion.sampling."""
    guidance: Guidance | None = None
    """Guidance scale of the generated images; null: train.diffusion.sampling."""
    clip: ClipSettings | None = None
    """The CLIP that judges images and prompts (clip, cmmd), and frames of clips (consistency); null: none."""
    fid: Fid | None = None
    """The feature network of FID and KID; null: none."""
    fad: Fid | None = None
    """The feature network (.pt) of the sounds of films, or of sounds alone; null: none."""
    kid: Kid = Kid()
    """Subsets over which KID is computed."""
    cmmd: ClipSettings | None = None
    """The CLIP of CMMD; null: that of `clip`."""

    @model_validator(mode="after")
    def _measures_have_what_they_need(self) -> Evaluate:
        measures = self.measures
        if measures is None:
            measures = self._default_measures()
            object.__setattr__(self, "measures", measures)  # sections are frozen
        clip, fid = "clip: {model: ./clip}", "fid: {features: ./inception.pth}"
        there = {"clip": self.clip, "fid": self.fid, "kid": self.fid, "cmmd": self.cmmd or self.clip}
        there |= {"consistency": self.clip, "fad": self.fad}
        needed = {"clip": clip, "fid": fid, "kid": fid, "cmmd": f"cmmd: {clip[6:]}", "consistency": clip}
        needed["fad"] = "fad: {features: ./vggish.pt}"
        for name, example in needed.items():
            if name in measures and there[name] is None:
                raise ValueError(f"measure {name} needs {example}")
        return self

    def _default_measures(self) -> list[Measure]:
        """Return the measures for which there is a network, and enough images."""
        chosen: list[Measure] = ["clip"] if self.clip is not None else []
        if self.clip is not None or self.cmmd is not None:
            chosen.append("cmmd")
        if self.fid is not None:
            chosen.append("kid")
            if self.count > _INCEPTION_FEATURES and not self.fid.features.endswith(".pt"):
                chosen.append("fid")
        if self.fad is not None:
            chosen.append("fad")
        if not chosen:
            raise ValueError(
                "names no network to measure with; set clip: {model: ./clip}, or measures: [oracle] for format: world"
            )
        return chosen

    def terms(self, measure: str) -> dict[str, Any]:
        """Return the settings that a value of `measure` depends on: values are comparable only if they are equal.

        >>> Evaluate(count=100, measures=["fid"], fid=Fid(features="a.pth")).terms("fid")
        {'count': 100, 'steps': None, 'guidance': None, 'judge': {'features': 'a.pth'}}
        """
        cmmd = self.cmmd or self.clip
        judges = {"clip": self.clip, "fid": self.fid, "kid": self.fid, "kid_std": self.fid, "cmmd": cmmd}
        judge = {**judges, "consistency": self.clip, "fad": self.fad}.get(measure)
        settings = None if judge is None else judge.model_dump(mode="json", exclude={"trust_torchscript"})
        if settings is not None and measure in ("kid", "kid_std"):
            settings |= self.kid.model_dump(mode="json")
        return {"count": self.count, "steps": self.steps, "guidance": self.guidance, "judge": settings}


class Best(Section):
    """Which evaluation's state is kept, regardless of train.checkpoint.keep."""

    measure: str
    """The metric that decides, by its name in evaluations.jsonl: clip, fid, colour_shape and others."""
    mode: Literal["max", "min"] | None = None
    """Whether more or less is better; null: less for fid, kid and cmmd, more for the others."""

    @property
    def sign(self) -> int:
        """Return 1 if higher is better, -1 if lower is."""
        mode = self.mode or ("min" if self.measure in _LOWER_IS_BETTER else "max")
        return 1 if mode == "max" else -1


class Watch(Section):
    """Trackers, sample grids and evaluations of a run."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]  # noqa: RUF012
    """Where curves and images are sent to."""
    bands: Positive = 10
    """Number of timestep ranges of loss_by_time."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak TFLOP/s of one device, for MFU; null: from a table of GPUs."""
    samples: Samples | None = None
    """Sample grids during training; null: none."""
    evaluate: Evaluate | None = None
    """Evaluations during training; null: none."""
    best: Best | None = None
    """Which evaluation's state is kept as the best; null: none."""

    @model_validator(mode="after")
    def _best_is_measured(self) -> Watch:
        if self.best is not None:
            measured = [name for m in ((self.evaluate.measures or []) if self.evaluate else []) for name in recorded(m)]
            if self.best.measure not in measured:
                have = f"one of {', '.join(measured)}" if measured else "add evaluate: {measures: [...]}"
                raise ValueError(f"best.measure {self.best.measure!r} is not measured; {have}")
        return self

    def draws(self) -> list[str]:
        """Return the keys that generate images, which need a model that can."""
        return [name for name, value in (("samples", self.samples), ("evaluate", self.evaluate)) if value is not None]


def recorded(measure: Measure) -> tuple[str, ...]:
    """Return the names of a measure's values in evaluations.jsonl."""
    if measure == "world":
        return ("parsed", "background_tv", "colours_tv")
    if measure == "layout":
        return tuple(f"layout_{name}" for name in ("count", "labels", "attributes", "place", "relation", "overlap"))
    if measure != "oracle":
        return ("kid", "kid_std") if measure == "kid" else (measure,)
    from capstan.pipeline.world.oracle import MEASURES  # loads OpenCV

    return MEASURES


def measures_in(text: str) -> list[Measure]:
    """Parse comma-separated names of measures. Raises RecipeError for an unknown one.

    >>> measures_in("oracle, clip")
    ['oracle', 'clip']
    """
    known = get_args(Measure)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RecipeError(
                "--measures", f"unknown measure {name!r}", f"use a comma-separated list of {', '.join(known)}"
            )
    return [measure for name in names for measure in known if measure == name]


def flat(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers as a flat mapping for trackers; nested names are joined by a slash.

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
