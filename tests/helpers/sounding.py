"""A small dataset of the sounding world: images, sounds and captions, as `capstan build` writes clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from capstan.pipeline.dataset.parts import part_columns, part_fields
from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, sha256_of, write_manifest, write_samples
from capstan.pipeline.media.codec import encode_flac
from capstan.pipeline.records import CRC32, SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.moving.captions import heard
from capstan.pipeline.world.moving.render import samples_of
from capstan.pipeline.world.moving.scene import MovingScene, draw_moving
from capstan.pipeline.world.render import encode_jpeg
from capstan.pipeline.world.scene import Vocabulary

RATE = 4000
VOCABULARY = Vocabulary(
    textures=("plain",), shapes=("circle", "square", "triangle"), colours=("red", "green", "blue"), max_objects=2
)


def scene(index: int) -> MovingScene:
    """A scene of one or two things in two seconds."""
    return draw_moving(0, index, VOCABULARY, frames=16, fps=8, entries=True)


def write_sounds(folder: Path, counts: list[int]) -> Path:
    """A finished dataset with shards of these many sounds of two seconds."""
    storage, entries, index = Storage(str(folder)), [], 0
    (folder / "shards").mkdir(parents=True)
    image = encode_jpeg(np.full((16, 16, 3), 128, np.uint8), 90)
    for number, count in enumerate(counts):
        name, rows, samples = f"shard-{number:06d}", [], []
        for _ in range(count):
            key, caption = make_key(str(index)), heard(scene(index))
            flac = encode_flac(samples_of(scene(index), RATE), RATE)
            samples.append(Sample(key, image, {"key": key}, caption, {"flac": flac}))
            sizes = {"width": 16, "height": 16, "original_width": 16, "original_height": 16}
            row = {"key": key, "caption": caption, "url": f"http://x.test/{index}.flac", "bytes": len(image)}
            row |= {"sha256": sha256_of(image), "phash": 0, "colours": "", "extra": "{}", "crop_left": 0, "crop_top": 0}
            rows.append(row | sizes)
            index += 1
        tar = folder / "shards" / f"{name}.tar"
        places = list(write_samples(tar, samples))
        rows = [
            row | {"offset": place.offset, "size": place.size, "json_size": place.json_size, "crc32": place.crc32}
            for row, place in zip(rows, places, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
        if "crc32" not in table.column_names:
            table = table.append_column(CRC32, pa.array([place.crc32 for place in places], pa.uint32()))
        for field in part_fields(["flac"]):
            table = table.append_column(field, part_columns([place.parts for place in places], ["flac"])[field.name])
        storage.write_table(f"shards/{name}.parquet", table)
        sums = {
            "sha256": sha256_of(tar.read_bytes()),
            "table_sha256": sha256_of(storage.read(f"shards/{name}.parquet")),
        }
        entries.append(ShardEntry(name=name, samples=count, bytes=tar.stat().st_size, **sums))
    write_manifest(storage, Manifest(shards=entries))
    return folder
