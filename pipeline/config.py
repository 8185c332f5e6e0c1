"""Recipe: YAML → a validated, frozen `Recipe`

Unknown keys are errors that name the field and the fix. The sections `recaption`, `train` and `experiment` belong to
the floors above: they are mappings here, which those floors parse once (`Recipe.section`; `cluster.recipe.load` does).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from capstan.pipeline.errors import RecipeError

Model = TypeVar("Model", bound=BaseModel)
Typed = TypeVar("Typed")


class Section(BaseModel):
    """A part of the recipe: frozen, and with no room for unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class WorldSource(Section):
    """The captioned world (`source.format: world`): drawn scenes, served as a loopback web site during the build."""

    scenes: Annotated[int, Field(ge=1)] = 1000
    size: Annotated[int, Field(ge=16, le=2048)] = 256  # pixels, both sides
    seed: int = 0
    captions: Literal["alt", "short", "descriptive"] = "alt"  # alt: like careless alt texts of the web
    defects: bool = True  # serve every known defect of the web, in known proportions
    shapes: list[str] | None = None  # restrict the vocabulary (None: all)
    colours: list[str] | None = None
    textures: list[str] | None = None
    min_objects: Annotated[int, Field(ge=1, le=3)] = 1
    max_objects: Annotated[int, Field(ge=1, le=3)] = 3


class Source(Section):
    path: str | list[str] | None = None
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl", "txt", "folder", "webdataset", "world"] = "auto"
    url: str | None = "url"  # column with the URL; null: none, where `image` is named
    image: str | None = None  # column with embedded bytes, instead of a URL
    caption: str = "caption"
    columns: Literal["all"] | list[str] | None = None  # carried in `extra`: names and globs, !glob leaves out;
    # all; null: all but vectors
    quoted: bool | None = None  # CSV, TSV: cells may be quoted as in RFC 4180; null: in CSV, not in TSV
    hash: str | None = None  # column with the md5, sha1, sha256 or sha512 that the image's bytes must have
    storage: dict[str, Any] | None = None  # fsspec options of the source; null: the dataset's, if in the same storage
    world: WorldSource | None = None

    @model_validator(mode="after")
    def _has_rows(self) -> Source:
        if self.format == "world":
            if self.path is not None:
                raise ValueError("format: world draws its own rows; remove path")
        elif self.path is None:
            raise ValueError("path is missing; name a file, glob, folder or URL")
        elif self.url is None and self.image is None and self.format not in ("auto", "folder", "webdataset"):
            raise ValueError("url is null and image is not set; name the column with the URLs or the images")
        elif self.world is not None:
            raise ValueError("world is only for format: world; remove it")
        return self


class Fetch(Section):
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64  # requests in flight per worker
    per_host: Annotated[int, Field(ge=1)] = 8
    timeout_s: Annotated[float, Field(gt=0)] = 20.0  # over the whole exchange, body included
    max_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    allow_private: bool = False
    robots: bool = True
    user_agent: str = "capstan/0.1 (image-text dataset builder)"


class Image(Section):
    size: Annotated[int, Field(ge=8, le=16384)] = 512  # pixels
    resize: Literal["keep_ratio", "center_crop", "border", "none"] = "keep_ratio"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    min_size: Annotated[int, Field(ge=1)] = 64  # shorter side of the source, pixels


class ClipScore(Section):
    """`clip_score`: cosine similarity of image and caption in an open_clip model."""

    model: str = "ViT-B-32"  # an open_clip name, or a folder with open_clip_config.json and its weights
    pretrained: str | None = None  # a checkpoint file, or one of open_clip's tags; null: the folder's own weights
    embeddings: bool = False  # keep the images' embeddings, float16
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch: Annotated[int, Field(ge=16, multiple_of=16)] = 64  # images per forward pass


class HeadScore(Section):
    """A small head over CLIP's image embeddings: linear layers from a file."""

    weights: str  # .pth or .safetensors
    activation: Literal["none", "relu", "gelu"] | None = None  # between layers; null: the usual one of this score
    output: Literal["linear", "sigmoid"] | None = None  # for one value; two values are always a softmax
    normalize: bool = True  # embeddings of length 1, as LAION's heads were trained on
    model: str | None = None  # the CLIP that the head was trained on; null: the one of score.clip
    pretrained: str | None = None


class NsfwScore(HeadScore):
    """`nsfw_score`: Yahoo's open_nsfw, which is in a package, or a head over CLIP's image embeddings from a file."""

    weights: str | None = None  # type: ignore[assignment]  # a head: .pth or .safetensors; null: open_nsfw

    @model_validator(mode="after")
    def _settings_of_a_head(self) -> NsfwScore:
        stated = [key for key in ("activation", "output", "model", "pretrained") if getattr(self, key) is not None]
        if self.weights is None and stated:
            raise ValueError(f"{stated[0]} is of a head over CLIP embeddings; name the head's file in weights")
        return self


class TextInImage(Section):
    """Text that PP-OCR reads in the image: the share of its area, and the words."""

    confidence: Annotated[float, Field(gt=0, le=1)] = 0.7  # lines read with less do not count
    letters: Annotated[int, Field(ge=1)] = 3  # lines with fewer do not count


class CaptionScore(Section):
    """Measures of the caption: length, words, script, repetition, boilerplate; URLs and file names in it."""

    boilerplate: list[str] = []  # more boilerplate phrases, case-insensitive


class LanguageScore(Section):
    """`language` and `language_score` from a fastText model."""

    weights: str | None = None  # lid.176.bin or another fastText model; null: lid.176.ftz, which is in the package


class ImageScore(Section):
    """Measures of the image: sharpness, flatness, JPEG quality, entropy, border."""


class Score(Section):
    """Scorers; each adds columns to the ledger."""

    clip: ClipScore | None = None
    aesthetic: HeadScore | None = None
    nsfw: NsfwScore | None = None
    watermark: HeadScore | None = None
    caption: CaptionScore | None = None
    language: LanguageScore | None = None
    image: ImageScore | None = None
    text_in_image: TextInImage | None = None

    @model_serializer(mode="wrap")
    def _without_text_in_image(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `text_in_image`, so that recipes of earlier versions keep their hash."""
        return _without_unset(dump(self), "text_in_image")


class Condition(Section):
    """A named step of the selection, one of:

    where      a SQL condition over the ledger's columns; rows for which it is not true are rejected
    at_most    the maximum number of rows per value of the SQL expression `per`; the highest `by` are kept
    balance    a SQL expression: every value keeps as many rows as the rarest has, but at least `at_least`
    top        the fraction of rows to keep, highest `by` first; with `per`, the fraction of each value's rows
    review     the name of a review (`capstan view`): the rows that it rejects are rejected; `name` may be left out

    Without `by`, the first rows by key are kept. Keys are hashes, so this is a random choice.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    where: Annotated[str, Field(min_length=1)] | None = None
    at_most: Annotated[int, Field(ge=1)] | None = None
    balance: Annotated[str, Field(min_length=1)] | None = None
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    review: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    per: Annotated[str, Field(min_length=1)] | None = None
    by: Annotated[str, Field(min_length=1)] | None = None
    at_least: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _name_review(cls, values: Any) -> Any:
        """Name a step `review` that states a review only."""
        if isinstance(values, dict) and values.get("review") is not None and "name" not in values:
            return {"name": "review", **values}
        return values

    @model_serializer(mode="wrap")
    def _without_review(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `review`, so that recipes of earlier versions keep their hash."""
        values: dict[str, Any] = dump(self)
        return values if values.get("review") is not None else {k: v for k, v in values.items() if k != "review"}

    @model_validator(mode="after")
    def _is_one_thing(self) -> Condition:
        kinds = [kind for kind in ("where", "at_most", "balance", "top", "review") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = ", ".join(kinds) or "none"
            raise ValueError(f"{self.name} needs one of where, at_most, balance, top and review (found: {found})")
        needed = {"at_most": ["per"], "top": ["by"]}.get(kinds[0], [])
        allowed = {"at_most": {"per", "by"}, "top": {"per", "by"}, "balance": {"by", "at_least"}}.get(kinds[0], set())
        if missing := [key for key in needed if getattr(self, key) is None]:
            raise ValueError(f"{self.name} has {kinds[0]} without {missing[0]}")
        # Compared by value, since a dumped recipe states every key.
        stated = {key for key in ("per", "by", "at_least") if getattr(self, key) not in (None, 1)}
        if extra := sorted(stated - allowed):
            raise ValueError(f"{self.name} has {kinds[0]}, which does not take {extra[0]}")
        return self

    @property
    def expressions(self) -> dict[str, str]:
        """Key → SQL expression, for every key of this step that holds SQL."""
        named = {key: getattr(self, key) for key in ("where", "balance", "per", "by")}
        return {key: sql for key, sql in named.items() if sql is not None}


def _without_unset(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """Leave out null values of these names."""
    return {name: value for name, value in values.items() if value is not None or name not in names}


Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class CopyDetection(Section):
    """Copies found by descriptors from a network such as SSCD: an ONNX file of images → one vector."""

    model: str  # .onnx: one float32 input, 1×3×H×W or 1×H×W×3; the first output is the descriptor. Or open_nsfw
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.75  # cosine of descriptors from which images are copies
    size: Annotated[int, Field(ge=8, le=2048)] | None = None  # images become size × size; null: the network's, or 320
    mean: Three = [0.485, 0.456, 0.406]  # of RGB in 0 … 1, subtracted; the default is ImageNet's
    std: Three = [0.229, 0.224, 0.225]  # of RGB in 0 … 1, divided by

    @model_validator(mode="after")
    def _preparation_fits(self) -> CopyDetection:
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; its numbers must be greater than 0")
        fields = CopyDetection.model_fields
        stated = [name for name in ("size", "mean", "std") if getattr(self, name) != fields[name].default]
        if self.model == "open_nsfw" and stated:
            raise ValueError(f"{stated[0]} is of an .onnx file; open_nsfw prepares images in its own way")
        return self


class Dedup(Section):
    exact: bool = True
    perceptual: Annotated[int, Field(ge=0, le=16)] | None = 6  # Hamming distance of 64-bit pHash; null: off
    colours: Annotated[int, Field(ge=0, le=255)] | None = 8  # largest colour difference of duplicates; null: any
    semantic: Annotated[float, Field(gt=0, le=1)] | None = None  # cosine of score.clip's embeddings; null: off
    decontaminate: str | list[str] | None = None  # evaluation images (a folder, tars, tables); near rows are dropped
    copies: CopyDetection | None = None  # edited copies: cropped, mirrored, framed; null: off

    @model_serializer(mode="wrap")
    def _without_copies(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `copies`, so that recipes of earlier versions keep their hash."""
        return _without_unset(dump(self), "copies")


class Blocklist(Section):
    """Text files, one entry per line: matching rows are neither fetched nor kept."""

    keys: str | None = None
    urls: str | None = None
    domains: str | None = None  # subdomains included
    sha256: str | None = None  # of source files


class Shards(Section):
    samples: Annotated[int, Field(ge=1)] = 10_000


class Unit(Section):
    rows: Annotated[int, Field(ge=1)] = 10_000


class Resources(Section):
    executor: Literal["auto", "processes", "ray"] = "auto"  # auto: processes of this machine for small runs, else Ray
    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    model_workers: Annotated[int, Field(ge=1)] | None = None
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None  # Ray's Prometheus exporter; null: a free port


class _Parsed:
    """Typed sections of a recipe, kept after first use. No part of its value: equal to any other, pickled empty."""

    def __init__(self) -> None:
        self.sections: dict[str, tuple[Any, Any]] = {}  # name → (the section's mapping, the section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parsed)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Parsed, ()


class Recipe(Section):
    """A recipe: it drives every stage, and each stage reads its own sections."""

    dataset: str
    storage: dict[str, Any] = {}  # fsspec options; secrets only from the environment
    source: Source | None = None
    fetch: Fetch = Fetch()
    image: Image = Image()
    score: Score = Score()
    select: list[Condition] = []
    dedup: Dedup = Dedup()
    blocklist: Blocklist = Blocklist()
    keep_staged: bool = True  # false: remove staged images once they are packed
    shards: Shards = Shards()
    unit: Unit = Unit()
    resources: Resources = Resources()
    recaption: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    experiment: dict[str, Any] | None = None
    _parsed: _Parsed = PrivateAttr(default_factory=_Parsed)

    def section(self, name: str, parse: Callable[[dict[str, Any]], Typed], hint: str) -> Typed:
        """Return the section `name` of a floor above, parsed by that floor once and kept.

        Raises RecipeError with `hint` if the recipe does not have it, and whatever `parse` raises.
        """
        raw = getattr(self, name)
        if raw is None:
            raise RecipeError(name, "is missing", hint)
        known = self._parsed.sections.get(name)
        if known is None or known[0] is not raw:
            known = self._parsed.sections[name] = (raw, parse(raw))
        found: Typed = known[1]
        return found

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [condition.name for condition in self.select]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"select names a condition twice: {', '.join(sorted(twice))}")
        if "removed" in names:
            raise ValueError("select names a condition `removed`, which is reserved for rows that are blocked")
        return self


def validate(model: type[Model], raw: Any, where: str = "") -> Model:
    """Return `raw` as a `model`. Raises RecipeError naming the first wrong field (dotted, below `where`)."""
    if not isinstance(raw, Mapping):
        raise RecipeError(where or "recipe", "must be a mapping of keys to values", "write `key: value` lines")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where] * bool(where) + [str(part) for part in first["loc"]]) or "recipe"
        raise RecipeError(field, *_explain(model, first)) from None


def _explain(model: type[BaseModel], error: Any) -> tuple[str, str]:
    """Turn a pydantic error into (problem, hint)."""
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _sibling_keys(model, error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"remove it; known keys: {', '.join(known)}"
        return "unknown key", hint
    if kind == "missing":
        return "is missing", "add it to the recipe"
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if kind == "value_error":
        return message, "correct the recipe"
    return f"{message} (found {_short(value)})", "correct the value"


def _sibling_keys(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """Return the keys that are allowed at the level of `loc`."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # an index into a list
        inner = [a for a in _walk_types(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _walk_types(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation] + [inner for argument in arguments for inner in _walk_types(argument)]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fingerprint(value: Any) -> str:
    """Return a 64-bit hash of `value` (plain data or a pydantic model) as 16 hexadecimal digits."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
