"""The recipe's sections `source`, `fetch` and `image`: rows → images of one size"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from capstan.pipeline.config.section import Section, without_unset


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


class OneLicense(Section):
    """One licence for all rows."""

    all: Annotated[str, Field(min_length=1)]


class Source(Section):
    path: str | list[str] | None = Field(default=None, examples=["urls.parquet"])
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
    license: str | OneLicense | None = None  # column with the rows' licences, or {all: CC-BY-4.0}

    @model_serializer(mode="wrap")
    def _without_license(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an unset `license`, so that recipes of earlier versions keep their hash."""
        return without_unset(dump(self), "license")

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
    per_host: Annotated[int, Field(ge=1)] = 8  # of all workers of a run together
    timeout_s: Annotated[float, Field(gt=0)] = 20.0  # over the whole exchange, body included
    max_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    allow_private: bool = False
    robots: bool = True
    noai: bool = True  # refuse images whose own metadata (IPTC, C2PA) forbids training; of any source
    user_agent: str = "capstan/0.1 (image-text dataset builder)"

    @model_serializer(mode="wrap")
    def _without_noai(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `noai` where it is true, so that recipes of earlier versions keep their hash."""
        values: dict[str, Any] = dump(self)
        return values if not self.noai else {name: value for name, value in values.items() if name != "noai"}


class Image(Section):
    size: Annotated[int, Field(ge=8, le=16384)] = 512  # pixels
    resize: Literal["keep_ratio", "center_crop", "border", "none"] = "keep_ratio"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    min_size: Annotated[int, Field(ge=1)] = 64  # shorter side of the source, pixels
    check: Literal["full", "header"] = "full"  # header: JPEGs that are stored as they are are copied, not decoded

    @model_validator(mode="after")
    def _copies_only_what_stays(self) -> Image:
        if self.check == "header" and self.resize != "none":
            raise ValueError(f"check: header copies images, and resize is {self.resize}; set resize: none")
        return self

    @model_serializer(mode="wrap")
    def _without_check(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `check: full`, so that recipes of earlier versions keep their hash."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if (name, value) != ("check", "full")}
