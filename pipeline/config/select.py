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


Three = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)]


class CopyDetection(Section):
    """Copies found by descriptors from a network such as SSCD: an ONNX file of images → one vector."""

    model: str  # .onnx: one float32 input, 1×3×H×W or 1×H×W×3; the first output is the descriptor. Or open_nsfw
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.75  # cosine of descriptors from which images are copies
    size: Annotated[int, Field(ge=8, le=2048)] | None = None  # images become size × size; null: the network's, or 320
    mean: Three = Field(default=[0.485, 0.456, 0.406])  # of RGB in 0 … 1, subtracted; the default is ImageNet's
    std: Three = Field(default=[0.229, 0.224, 0.225])  # of RGB in 0 … 1, divided by

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
        return without_unset(dump(self), "copies")


class Blocklist(Section):
    """Text files, one entry per line: matching rows are neither fetched nor kept."""

    keys: str | None = None
    urls: str | None = None
    domains: str | None = None  # subdomains included
    sha256: str | None = None  # of source files
