"""The recipe's sections `source`, `fetch` and `image`: rows → images of one size"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from capstan.pipeline.config.section import Section, without_unset


class MovingWorld(Section):
    """Clips in place of images: the scenes move (`capstan cut`)."""

    frames: Annotated[int, Field(ge=2, le=256)] = 8
    """Frames of each clip."""
    fps: Annotated[int, Field(ge=1, le=60)] = 8
    """Frames per second."""
    entries: bool = False
    """Whether things enter one after the other, from left to right; else all are there from the start."""
    sound: Annotated[int, Field(ge=2000, le=48_000)] | None = None
    """Samples per second of the clips' sound, in which each thing's colour is a pitch; null: they are silent."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is unset, so that worlds of earlier versions keep their URLs."""
        values = without_unset(dump(self), "sound")
        return values if self.entries else {name: value for name, value in values.items() if name != "entries"}


class WorldSource(Section):
    """The captioned world (`source.format: world`): drawn scenes, served as a loopback web site during the build."""

    scenes: Annotated[int, Field(ge=1)] = 1000
    """Number of scenes, one row each."""
    size: Annotated[int, Field(ge=16, le=2048)] = 256
    """Side of the drawn images in pixels."""
    seed: int = 0
    """Seed of the scenes: the same seed draws the same scenes."""
    captions: Literal["alt", "short", "descriptive", "heard"] = "alt"
    """Captions of the rows: like careless alt texts of the web, true short or descriptive ones, or what is heard."""
    defects: bool = True
    """Whether the site serves every known defect of the web, in known proportions."""
    shapes: list[str] | None = None
    """Shapes that occur; null: all."""
    colours: list[str] | None = None
    """Colours that occur; null: all."""
    textures: list[str] | None = None
    """Textures that occur; null: all."""
    min_objects: Annotated[int, Field(ge=1, le=3)] = 1
    """Smallest number of objects in a scene."""
    max_objects: Annotated[int, Field(ge=1, le=3)] = 3
    """Largest number of objects in a scene."""
    moving: MovingWorld | None = None
    """Clips of scenes that move, for `capstan cut`; null: images, for `capstan build`."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `moving` where it is unset, so that worlds of earlier versions keep their URLs."""
        return without_unset(dump(self), "moving")

    @model_validator(mode="after")
    def _moves_truly(self) -> WorldSource:
        if self.moving is not None and (self.captions == "alt" or self.defects):
            raise ValueError("moving scenes have true captions and no defects; set captions: short, defects: false")
        if self.captions == "heard" and (self.moving is None or self.moving.sound is None):
            raise ValueError("captions: heard are of clips with sound; set moving.sound, or other captions")
        return self


class OneLicense(Section):
    """One licence for all rows."""

    all: Annotated[str, Field(min_length=1)]
    """The licence of all rows, as an SPDX expression or a URL."""


class Source(Section):
    path: str | list[str] | None = Field(default=None, examples=["urls.parquet"])
    """A file, glob, folder or fsspec URL, or a list of them."""
    format: Literal["auto", "parquet", "csv", "tsv", "jsonl", "txt", "folder", "webdataset", "world"] = "auto"
    """Format of the files; auto: by their names."""
    url: str | None = "url"
    """Column with the URL; null: none, where `image` is set."""
    image: str | None = None
    """Column with embedded image bytes, instead of a URL; null: none."""
    caption: str = "caption"
    """Column with the caption."""
    columns: Literal["all"] | list[str] | None = None
    """Columns to carry in `extra`: names and globs, !glob leaves out; or all; null: all but vectors."""
    quoted: bool | None = None
    """Whether cells of CSV and TSV may be quoted as in RFC 4180; null: in CSV, not in TSV."""
    hash: str | None = None
    """Column with the md5, sha1, sha256 or sha512 that the image's bytes must have; null: not compared."""
    storage: dict[str, Any] | None = None
    """Options of fsspec for the source's storage; null: the dataset's, if it is the same storage."""
    world: WorldSource | None = None
    """Settings of the captioned world, for format: world."""
    license: str | OneLicense | None = None
    """Column with the rows' licences, or {all: CC-BY-4.0}; null: none."""
    parts: list[Literal["mp4", "flac"]] | None = None
    """Files next to the image in a tar's samples that go into the shards as they are, for clips; null: none."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is unset, so that recipes of earlier versions keep their hash."""
        return without_unset(dump(self), "license", "parts")

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
        if self.parts is not None and self.format not in ("auto", "webdataset"):
            raise ValueError(f"parts are of samples in tars, and format is {self.format}; remove parts")
        if self.parts is not None and len(set(self.parts)) < max(1, len(self.parts)):
            raise ValueError("parts is empty or names a part twice; set e.g. parts: [mp4, flac]")
        return self


class Fetch(Section):
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Number of requests in flight per worker."""
    per_host: Annotated[int, Field(ge=1)] = 8
    """Number of requests in flight per host, of all workers of a run together."""
    timeout_s: Annotated[float, Field(gt=0)] = 20.0
    """Seconds for a whole exchange, body included."""
    max_bytes: Annotated[int, Field(ge=1)] = 20_000_000
    """Largest body in bytes; larger ones fail as `too_large_bytes`."""
    retries: Annotated[int, Field(ge=0, le=20)] = 2
    """Number of further tries after a transient failure."""
    allow_private: bool = False
    """Whether hosts on private and loopback addresses may be fetched from."""
    robots: bool = True
    """Whether robots.txt and X-Robots-Tag are obeyed."""
    noai: bool = True
    """Whether images whose metadata or headers forbid training are refused."""
    user_agent: str = "capstan/0.1 (image-text dataset builder)"
    """The User-Agent that sites see."""

    @model_serializer(mode="wrap")
    def _without_noai(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `noai` where it is true, so that recipes of earlier versions keep their hash."""
        values: dict[str, Any] = dump(self)
        return values if not self.noai else {name: value for name, value in values.items() if name != "noai"}


class Image(Section):
    size: Annotated[int, Field(ge=8, le=16384)] = 512
    """Size of stored images in pixels (see resize); images are never enlarged."""
    resize: Literal["keep_ratio", "center_crop", "border", "none"] = "keep_ratio"
    """How images get their size: shorter side (keep_ratio), cut to a square (center_crop), padded to a square (border),
    or none."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality of stored images, 1 to 100."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """Largest number of pixels of a source image; larger ones fail as `too_many_pixels` before they are decoded."""
    min_size: Annotated[int, Field(ge=1)] = 64
    """Smallest shorter side of a source image in pixels; smaller ones fail as `too_small`."""
    check: Literal["full", "header"] = "full"
    """Whether each image is decoded to check it; header: JPEGs that are stored as they are are copied undecoded."""

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
