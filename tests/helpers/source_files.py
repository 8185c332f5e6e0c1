"""Files of rows for tests, and the rows that Capstan reads from them."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capstan.pipeline.config import Recipe
from capstan.pipeline.source import SourceReader

URLS = [f"http://example.org/{n}.jpg" for n in range(3)]
CAPTIONS = ["a cat", "zwei Hunde, „groß“", ""]
TABLE = pa.table({"url": URLS, "caption": CAPTIONS, "width": [1, 2, None]})


def recipe(path: Path | str, **source: Any) -> Recipe:
    return Recipe.model_validate({"dataset": "unused", "source": {"path": str(path)} | source})


def rows(path: Path | str, **source: Any) -> list[dict[str, Any]]:
    return [row for table in SourceReader(recipe(path, **source)).tables() for row in table.to_pylist()]


def urls_and_captions(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["url"], row["caption"]) for row in found]


def write_table(path: Path) -> None:
    lines = list(zip(URLS, CAPTIONS, strict=True))
    match path.suffix:
        case ".parquet":
            pq.write_table(TABLE, path, row_group_size=1)
        case ".csv":
            path.write_text("url,caption,width\n" + "".join(f'{url},"{caption}",\n' for url, caption in lines))
        case ".tsv":
            path.write_text("url\tcaption\n" + "".join(f"{url}\t{caption}\n" for url, caption in lines))
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in TABLE.to_pylist()))
        case ".txt":
            path.write_text("\n".join([*URLS, "", ""]))


def packed(path: Path, how: str) -> Path:
    """`path` compressed as `how` says, next to it."""
    pack: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    target = path.with_name(f"{path.name}.{how}")
    target.write_bytes(pack[how](path.read_bytes()))
    return target


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


MEMBERS = [
    ("x/1.jpg", b"JPEG one"),
    ("x/1.txt", b"a cat"),
    ("2.webp", b"WEBP"),
    ("2.json", b'{"caption": "a dog", "n": 1}'),
    ("3.txt", b"no image"),
]
