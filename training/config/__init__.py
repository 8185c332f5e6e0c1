"""The recipe's section `train` → a validated TrainConfig with family settings

    recipe.train = {model, run, steps, batch, ..., data: {}, engine: {}, checkpoint: {}, <family>: {}}

`train.model` names a family of `FAMILIES`, or your own class as `package.module:Class`. A family's settings are in the
section of its name (`train.diffusion`, ...); the family defines their schema.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, PrivateAttr, field_validator, model_validator

from capstan.pipeline.config import Recipe, Section, fingerprint, validate
from capstan.pipeline.errors import RecipeError
from capstan.training.config.families import FAMILIES, traits_of
from capstan.training.config.monitoring import Watch

ORIGINAL: Final = "original"  # the slot of the caption that came with the image
AUTO: Final = "auto"  # of latents: encode what is missing, then read them

Positive = Annotated[int, Field(ge=1)]


class Buckets(Section):
    """Aspect-ratio buckets: every batch holds images of one size. List the sizes, or generate them in steps."""

    sizes: Annotated[list[tuple[Positive, Positive]], Field(min_length=1)] | None = None
    """Sizes of the buckets as [width, height] in pixels; null: generate them from `size`."""
    size: Positive | None = None
    """Side in pixels of the square whose area all generated buckets have; null: use `sizes`."""
    step: Positive = 64
    """Multiple in pixels of which generated sides are."""
    ratio: Annotated[float, Field(ge=1)] = 2.0
    """Largest ratio of the longer side to the shorter."""

    @model_validator(mode="after")
    def _has_sizes(self) -> Buckets:
        if (self.sizes is None) == (self.size is None):
            raise ValueError(
                "set either sizes, or size (the side of a square of their area); e.g. buckets: {size: 512}"
            )
        if self.size is not None and self.size % self.step:
            raise ValueError(f"size {self.size} does not divide by step {self.step}")
        if self.sizes is not None and len({width / height for width, height in self.sizes}) < len(self.sizes):
            raise ValueError("two of sizes have the same aspect ratio; remove one")
        return self


class Cache(Section):
    """Whole shards of a bucket, copied before use into a folder that all workers of a machine share."""

    folder: str = Field(examples=["/tmp/shards"])
    """Folder on a local disk for the copies."""
    gib: Annotated[float, Field(gt=0)]
    """Size limit of the folder in GiB; best with room for two windows (2 × block shards)."""


class WeightedDataset(Section):
    """One of several datasets, with its share of the samples."""

    dataset: str
    """The dataset's folder or URL; storage options are the recipe's."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the dataset: its share of the samples is weight / sum of weights."""
    layer: str | None = "latest"
    """Caption layer of this dataset: an id, latest, or null for original captions; default: that of train.data."""


class Bad(Section):
    """Samples that cannot be read or decoded. Without this section the first one ends the run."""

    skip: Positive
    """Largest number of bad samples in the whole run; each is replaced by another sample of its batch."""


class Data(Section):
    """Which samples, captions and precomputed states a training step sees, and in which order."""

    layer: str | None = "latest"
    """Caption layer: an id, latest, or null for the original captions."""
    blend: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Slot → weight with which its caption is drawn; null: 95% descriptive, 5% original (as far as there are layers).
"""
    datasets: Annotated[list[WeightedDataset], Field(min_length=1)] | None = None
    """Datasets to mix, with weights; null: the recipe's dataset alone."""
    latents: str | None = None
    """Precomputed latents to read instead of images: an encoder id, or auto (encode what is missing); null: images."""
    text_states: Literal["auto"] | None = None
    """Whether text states are precomputed (auto), which needs a frozen text encoder; null: computed in each step."""
    buckets: Buckets | None = None
    """Aspect-ratio buckets; null: images are cut to squares."""
    holdout: Annotated[int, Field(ge=0)] = 0
    """Number of samples to exclude from training: the last of each dataset."""
    block: Annotated[int, Field(ge=1)] = 8
    """Number of shards whose samples are shuffled together within an epoch."""
    lanes: Annotated[int, Field(ge=1)] | None = None
    """Lanes with shards of their own, a divisor of batch; null: at most block or the workers; 1: no lanes."""
    prefetch: Annotated[int, Field(ge=1)] = 4
    """Number of prepared batches that each worker keeps ready."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Number of loader threads on each worker."""
    cache: Cache | None = None
    """Local copies of the shards of a bucket; null: one request per image."""
    bad: Bad | None = None
    """Skips samples that cannot be read; null: the first one ends the run."""

    @model_validator(mode="after")
    def _blend_has_weight(self) -> Data:
        if self.blend is not None:
            if sum(self.blend.values()) <= 0:
                raise ValueError("all weights of blend are 0; set e.g. blend: {descriptive: 0.95, original: 0.05}")
            if self.layer is None and set(self.blend) != {ORIGINAL}:
                raise ValueError("blend names slots of a caption layer, but layer is null; set layer")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Return slot → probability (default: 95% descriptive, 5% original, as in the DALL-E 3 paper)."""
        default = {ORIGINAL: 1.0} if self.layer is None else {"descriptive": 0.95, ORIGINAL: 0.05}
        blend = self.blend or default
        return {slot: weight / sum(blend.values()) for slot, weight in sorted(blend.items()) if weight > 0}


class Engine(Section):
    """How the work is distributed over processes. All of it may change when a run resumes."""

    strategy: Literal["deepspeed", "ddp"] = "deepspeed"
    """What keeps the workers in step: DeepSpeed, or PyTorch's DDP."""
    zero: Annotated[int, Field(ge=0, le=3)] = 2
    """Level of DeepSpeed's ZeRO: 0 nothing is sharded, 1 optimizer, 2 and gradients, 3 and weights."""
    workers: int | tuple[int, int] = 1
    """Number of processes, one per GPU; [least, most]: as many as resources allow."""
    launcher: Literal["ray", "local"] = "ray"
    """What starts the workers: Ray Train, or plain processes on this machine."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Number of restarts after a worker died, each from the last checkpoint."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of each worker; null: cores / workers."""
    offload: bool = False
    """Whether Adam's state is kept in CPU memory and stepped there (ZeRO 1 to 3)."""
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass (gradient checkpointing), which saves memory."""
    compile: bool = False
    """Whether the model is compiled by torch.compile."""
    channels_last: bool = False
    """Whether images are [B, H, W, C] in memory."""

    @field_validator("workers", mode="before")
    @classmethod
    def _are_counts(cls, workers: Any) -> Any:
        counts = workers if isinstance(workers, list | tuple) and len(workers) == 2 else [workers]
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ValueError("must be a number of processes or [least, most]; set e.g. 2 or [1, 8]")
        return workers

    @model_validator(mode="after")
    def _fits_together(self) -> Engine:
        if self.strategy == "ddp" and self.zero not in (0, Engine.model_fields["zero"].default):
            raise ValueError("zero requires strategy: deepspeed; remove one of them")
        if self.offload and (self.strategy == "ddp" or self.zero == 0):
            raise ValueError("offload requires strategy: deepspeed with zero: 1, 2 or 3; set those, or remove it")
        if self.least > self.most:
            raise ValueError(f"workers is [least, most]; set [{self.most}, {self.least}]")
        if isinstance(self.workers, tuple) and self.launcher == "local":
            raise ValueError(f"workers: {list(self.workers)} requires launcher: ray; set workers: {self.most}")
        return self

    @property
    def least(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class Checkpoint(Section):
    """When the state of a run is saved, and where to. All of it may change when a run resumes."""

    every: Annotated[int, Field(ge=1)] = 500
    """Steps from one checkpoint to the next."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep, the newest ones."""
    upload: str | None = None
    """URL of a bucket that checkpoints and product are also uploaded to; null: none."""


class Diverged(Section):
    """When a loss counts as diverging: the run then stops and writes the keys of the batches to a file."""

    factor: Annotated[float, Field(gt=1)] = 10.0
    """A loss above this factor times the median of the losses before it is high."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Number of high losses in a row that stop the run."""


Shape = Literal["constant", "cosine", "linear"]


class Restart(Section):
    """A learning rate that starts again, in a run made longer after its schedule had ended.

    A warm restart (Loshchilov & Hutter 2017, SGDR): from step `restart` on the rate warms up again, to `lr`.
    """

    before: Shape = "cosine"
    """Shape of the schedule that ended at step `restart`, as it was in the recipe."""
    restart: Positive
    """Step at which the learning rate starts again: what train.steps was."""
    then: Shape = "cosine"
    """Shape of the schedule from there to train.steps."""


class TrainConfig(Section):
    """One training run."""

    model: str = Field(examples=["diffusion"])
    """The model family: a folder of training/models, e.g. diffusion, or package.module:Class of your own."""
    run: Annotated[str, Field(min_length=1, examples=["./out/run"])]
    """Folder of the run, or a bucket's URL: its log, checkpoints and product."""
    steps: Annotated[int, Field(ge=1, examples=[100_000])]
    """Number of optimizer steps."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Samples per step, over all workers."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Number of parts in which each worker processes its share of a batch."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, and all other random choices."""
    init: str | None = None
    """A run folder or its product whose weights training starts from; null: random weights."""
    before: list[dict[str, Any]] = []  # noqa: RUF012
    """Runs that this one needs, each a section `train`; they are trained first."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Shape | Restart = "constant"
    """Learning rate after warm-up: constant, or falling to final_lr at the last step; or {restart: STEP}."""
    warmup: Annotated[int, Field(ge=0)] = 100
    """Steps in which the learning rate rises linearly from 0."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the end of cosine and linear, as a fraction of lr."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Both betas of AdamW."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW, on matrices and kernels, not on biases, norms and scalars."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest gradient norm; null: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the forward pass; fp16 needs GPUs and scales the loss."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    """Decay of the weights' moving average; null: no average."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps from one line of the log to the next."""
    data: Data = Data()
    """Which samples and captions a step sees, and in which order."""
    diverged: Diverged | None = Diverged()
    """When a loss counts as diverging, which stops the run; null: never."""
    engine: Engine = Engine()
    """How the work is distributed over processes."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state of the run is saved, and where to."""
    watch: Watch = Watch()
    """Trackers, sample grids and evaluations during training."""

    _settings: Any = PrivateAttr(default=None)

    @field_validator("schedule", mode="before")
    @classmethod
    def _is_shape_or_restart(cls, schedule: Any) -> Any:
        if isinstance(schedule, dict):
            return validate(Restart, schedule, "train.schedule")
        if schedule not in get_args(Shape) and not isinstance(schedule, Restart):
            raise ValueError(f"must be one of {', '.join(get_args(Shape))}, or set e.g. schedule: {{restart: 1000}}")
        return schedule

    @model_validator(mode="after")
    def _has_one_bucket(self) -> TrainConfig:
        if "://" in self.run and self.checkpoint.upload is not None:
            raise ValueError("run is in a bucket, so everything is uploaded there; remove checkpoint.upload")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainConfig:
        if not self.world_sizes():
            parts = self.engine.least * self.accumulate
            raise ValueError(
                f"batch {self.batch} is not a multiple of engine.workers × accumulate ({parts}); "
                f"use e.g. batch: {-(-self.batch // parts) * parts}"
            )
        if self.batch % (self.data.lanes or 1):
            raise ValueError(f"batch {self.batch} is not a multiple of data.lanes ({self.data.lanes}); change one")
        return self

    def world_sizes(self) -> list[int]:
        """Return the allowed numbers of workers, largest first: those that divide the batch and its parts evenly."""
        sizes = range(self.engine.most, self.engine.least - 1, -1)
        return [size for size in sizes if self.batch % (size * self.accumulate) == 0]

    @property
    def settings(self) -> Any:
        """Return the settings of the family that `model` names (an instance of `Family.settings`)."""
        return self._settings

    @property
    def folder(self) -> Path:
        """Return the run folder; for a run in a bucket, its local working folder."""
        return scratch_folder(self.run) if "://" in self.run else Path(self.run)

    @property
    def bucket(self) -> str | None:
        """Return the URL that the run is uploaded to, if any."""
        return self.run if "://" in self.run else self.checkpoint.upload

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> TrainConfig:
        """Return the validated section `train`, including every family's section in it. Raises RecipeError."""
        return recipe.section("train", cls.from_section, "add the section, e.g. train: {model: diffusion, run: ./run}")

    @classmethod
    def from_section(cls, raw: dict[str, Any]) -> TrainConfig:
        """Return the same as `from_recipe`, from the section's mapping."""
        name = raw.get("model")
        chosen = traits_of(name) if isinstance(name, str) else None
        section = chosen.name if chosen else None
        inner = {key: raw[key] for key in raw if key in FAMILIES or key == section}
        config = validate(cls, {key: value for key, value in raw.items() if key not in inner}, "train")
        for key, value in inner.items():
            family = chosen if chosen and key == section else traits_of(key)
            settings = validate(family.settings, value or {}, f"train.{key}")
            if key == section:
                config._settings = settings
        if chosen and config._settings is None:
            config._settings = validate(chosen.settings, {}, f"train.{section}")
        if chosen and config.data.buckets is not None and not chosen.buckets:
            raise RecipeError("train.data.buckets", f"the family {chosen.name} supports squares only", "remove it")
        if chosen and chosen.draws is None and (drawing := config.watch.draws()):
            problem = f"generates images from prompts, and {name} cannot"
            raise RecipeError(f"train.watch.{drawing[0]}", problem, "remove it")
        if chosen:
            chosen.check(config)
        for number, earlier in enumerate(config.before):
            _check_earlier(number, earlier, config.run)
        return config

    def identity(self) -> dict[str, Any]:
        """Return the settings that must not change when a run resumes, as plain data.

        Left out: where and on how many workers it runs, how often it logs and saves, `watch`, `steps`, and a schedule's
        restart. Runs that come `before` have an identity of their own.
        """
        free = {"run", "before", "steps", "log_every", "engine", "checkpoint", "diverged", "watch"}
        fixed = self.model_dump(mode="json", exclude=free | {"data"})
        free = {"prefetch", "threads", "cache", "bad", *(["lanes"] if self.data.lanes is None else [])}
        fixed["data"] = self.data.model_dump(mode="json", exclude=free)
        fixed["schedule"] = self.schedule if isinstance(self.schedule, str) else self.schedule.before
        fixed["settings"] = self.settings.model_dump(mode="json") if self.settings is not None else {}
        return fixed

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with anything in `identity`."""
        return fingerprint(self.identity())


def _check_earlier(number: int, section: dict[str, Any], last: str) -> None:
    """Raise RecipeError if a run of `train.before` is wrong; it is named by its place."""
    field = f"train.before.{number}"
    try:
        earlier = TrainConfig.from_section(section)
    except RecipeError as error:
        where = field + error.field.removeprefix("train")
        raise RecipeError(where, error.problem, error.hint) from None
    if earlier.before:
        raise RecipeError(f"{field}.before", "is a list within a list", "name all runs in one list, in their order")
    if earlier.run == last:
        raise RecipeError(f"{field}.run", f"is {last}, the folder of the last run", "give each run its own folder")


def scratch_folder(url: str) -> Path:
    """Return the local folder of a run in a bucket: below $CAPSTAN_RUNS, or the user's cache."""
    root = Path(os.environ.get("CAPSTAN_RUNS") or Path.home() / ".cache" / "capstan" / "runs")
    return root / f"{url.rstrip('/').rpartition('/')[2]}-{fingerprint(url.rstrip('/'))}"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the section `train`, including the families' sections."""
    schema = TrainConfig.model_json_schema()
    for name in FAMILIES:
        inner = traits_of(name).settings.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        for key, definition in inner.pop("$defs", {}).items():
            schema.setdefault("$defs", {})[f"{name}.{key}"] = definition
        schema["properties"][name] = inner
    return schema
