"""croissant.json: the dataset in the JSON-LD of MLCommons' Croissant 1.0, which catalogues and mlcroissant read

One record per sample: its image, read from the tars, and its row of the shard's table, joined by key. URLs are
relative, so that the file is as true in a copy as it is here.
"""

from __future__ import annotations

import json
from typing import Any, Final

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset.shards import Manifest, ShardEntry

NAME: Final = "croissant.json"
PUBLISHED: Final = "published"  # section of a published manifest's recipe (pipeline.publish)
_CONFORMS: Final = "http://mlcommons.org/croissant/1.0"
_CONTEXT: Final[dict[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FACTS: Final = {  # columns of the shards' tables
    "caption": ("sc:Text", "Caption of the image"),
    "url": ("sc:Text", "URL that the image was fetched from, or its name in the source"),
    "width": ("sc:Integer", "Width of the image in pixels"),
    "height": ("sc:Integer", "Height of the image in pixels"),
    "sha256": ("sc:Text", "SHA-256 of the source file"),
}
_LICENSE: Final = ("sc:Text", "What the source says about the image's licence, as an SPDX license expression")
_TABLES: Final = {
    "@type": "cr:FileSet",
    "@id": "tables",
    "name": "tables",
    "encodingFormat": "application/x-parquet",
    "includes": "shards/*.parquet",
}


def croissant(manifest: Manifest) -> bytes:
    """Return croissant.json. Equal shards and licences give equal files."""
    published = manifest.recipe.get(PUBLISHED) or {}
    samples = sum(entry.samples for entry in manifest.shards)
    licenses = [name for name in manifest.licenses if not name.startswith("LicenseRef-") and name != "NOASSERTION"]
    described: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": _CONFORMS,
        "name": str(published.get("name") or "dataset"),
        "description": f"{samples:,} captioned images in WebDataset shards, collected and filtered with Capstan.",
        "version": f"1.0.0+{fingerprint([entry.sha256 for entry in manifest.shards])}",
        **({"url": published["url"]} if published.get("url") else {}),
        **({"license": licenses} if licenses else {}),
        "distribution": [*map(_tar, manifest.shards), _images(manifest.shards), _TABLES],
        "recordSet": [_samples(licensed=bool(manifest.licenses))],
    }
    return json.dumps(described, indent=1, ensure_ascii=False).encode() + b"\n"


def _tar(entry: ShardEntry) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": f"{entry.name}.tar",
        "name": f"{entry.name}.tar",
        "contentUrl": entry.tar,
        "contentSize": f"{entry.bytes} B",
        "encodingFormat": "application/x-tar",
        "sha256": entry.sha256,
    }


def _images(shards: list[ShardEntry]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "containedIn": [{"@id": f"{entry.name}.tar"} for entry in shards],
        "encodingFormat": "image/jpeg",
        "includes": "*.jpg",
    }


def _samples(*, licensed: bool) -> dict[str, Any]:
    """Return the record set: one record per sample, its image and its row of the shard's table joined by their key."""
    facts = _FACTS | ({"license": _LICENSE} if licensed else {})
    name = {"extract": {"fileProperty": "filename"}, "transform": {"regex": r"^(.*)\.jpg$"}}
    key = _field("key", "sc:Text", "Key of the sample, 32 hexadecimal digits", {"fileSet": {"@id": "images"}, **name})
    key["references"] = _from("tables", {"column": "key"})
    fields = [
        key,
        _field("image", "sc:ImageObject", "JPEG, sRGB", _from("images", {"fileProperty": "content"})),
        *(_field(name, *about, _from("tables", {"column": name})) for name, about in facts.items()),
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": "samples",
        "name": "samples",
        "key": {"@id": "samples/key"},
        "field": fields,
    }


def _field(name: str, kind: str, about: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"samples/{name}",
        "name": name,
        "description": about,
        "dataType": kind,
        "source": source,
    }


def _from(files: str, extract: dict[str, str]) -> dict[str, Any]:
    return {"fileSet": {"@id": files}, "extract": extract}
