"""The recipe's sections `select`, `dedup` and `blocklist`: measured rows → those that are kept"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from capstan.pipeline.config.section import Section, without_unset


class Condition(Section):
    """A named step of the selection, one of:

    where      a SQL condition over the ledger's columns; rows for which it is not true are rejected
    at_most    the maximum number of rows per value of the SQL expression `per`; the highest `by` are kept
    balance    a SQL expression: every value keeps as many rows as the rarest has, but at least `at_least`
    top        the fraction of rows to keep, highest `by` first; with `per`, the fraction of each value's rows
    review     the name of a review (`capstan view`): the rows that it rejects are rejected; `name` may be left out

    Without `by`, the first rows by key are kept. Keys are hashes, so this is a random choice.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", examples=["size"])]
    """Name of the step: the reason of the rows that it rejects."""
    where: Annotated[str, Field(min_length=1)] | None = None
    """SQL condition over the ledger's columns; rows for which it is not true are rejected."""
    at_most: Annotated[int, Field(ge=1)] | None = None
    """Largest number of rows per value of `per`; the highest `by` are kept."""
    balance: Annotated[str, Field(min_length=1)] | None = None
    """SQL expression; every value keeps as many rows as the rarest one has."""
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of rows to keep, highest `by` first."""
    review: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Name of a review (`capstan view`); the rows that it rejects are rejected."""
    per: Annotated[str, Field(min_length=1)] | None = None
    """SQL expression whose values form the groups of at_most and top; null (top): all rows are one group."""
    by: Annotated[str, Field(min_length=1)] | None = None
    """SQL expression that ranks rows, highest first; null: by key, which is a random choice."""
    at_least: Annotated[int, Field(ge=1)] = 1
    """With `balance`: the smallest number of rows that each value keeps."""

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


Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class CopyDetection(Section):
    """Copies found by descriptors from a network such as SSCD: an ONNX file of images → one vector."""

    model: str
    """Network of the descriptors: an .onnx file with one float32 input of images and the descriptor as its first
    output; or open_nsfw."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Cosine of two descriptors from which images are copies."""
    size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels to which images are resized for the network; null: the network's own, or 320."""
    mean: Three = Field(default=[0.485, 0.456, 0.406])
    """Mean per channel (RGB in 0 … 1), subtracted before the network; the default is ImageNet's."""
    std: Three = Field(default=[0.229, 0.224, 0.225])
    """Standard deviation per channel (RGB in 0 … 1), divided by before the network."""

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
    """Whether files with the same SHA-256 are duplicates."""
    perceptual: Annotated[int, Field(ge=0, le=16)] | None = 6
    """Largest Hamming distance of the 64-bit perceptual hashes of duplicates; null: off."""
    colours: Annotated[int, Field(ge=0, le=255)] | None = 8
    """Largest colour difference of perceptual duplicates, 0 to 255; null: any."""
    semantic: Annotated[float, Field(gt=0, le=1)] | None = None
    """Cosine of score.clip's embeddings from which images are duplicates; null: off."""
    decontaminate: str | list[str] | None = None
    """Evaluation images (a folder, tars or tables): rows near one of them are dropped; null: none."""
    copies: CopyDetection | None = None
    """Finds edited copies: cropped, mirrored or framed; null: off."""

    @model_serializer(mode="wrap")
    def _without_copies(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `copies`, so that recipes of earlier versions keep their hash."""
        return without_unset(dump(self), "copies")


class Blocklist(Section):
    """Text files, one entry per line: matching rows are neither fetched nor kept."""

    keys: str | None = None
    """File of keys that must not be in the dataset, one per line."""
    urls: str | None = None
    """File of URLs that must not be in the dataset, one per line."""
    domains: str | None = None
    """File of domains that must not be in the dataset, one per line; subdomains are included."""
    sha256: str | None = None
    """File of SHA-256 sums of source files that must not be in the dataset, one per line."""
