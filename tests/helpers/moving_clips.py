"""A small dataset of the moving world: images, clips and captions, as `capstan build` writes clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from capstan.pipeline.config.cut import Cut
from capstan.pipeline.dataset.parts import part_columns, part_fields
from capstan.pipeline.dataset.shards import Manifest, Sample, ShardEntry, sha256_of, write_manifest, write_samples
from capstan.pipeline.media.codec import Scaler, VideoWriter, encode_flac
from capstan.pipeline.records import SHARD_SCHEMA, make_key
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.moving.captions import descriptive
from capstan.pipeline.world.moving.render import frames_of, samples_of
from capstan.pipeline.world.moving.scene import MovingScene, draw_moving
from capstan.pipeline.world.render import encode_jpeg
from capstan.pipeline.world.scene import Vocabulary

SIDE, FRAMES, FPS = 16, 6, 8
VOCABULARY = Vocabulary(
    textures=("plain",), shapes=("circle", "square"), colours=("red", "green", "blue"), max_objects=2
)


def scene(index: int) -> MovingScene:
    """A scene of one or two things in six frames."""
    return draw_moving(0, index, VOCABULARY, frames=FRAMES, fps=FPS)


def mp4_of(frames: np.ndarray, fps: int = FPS) -> bytes:
    """A clip of these frames, uint8 [frames, H, W, 3], with whole colours."""
    height, width = frames.shape[1:3]
    writer, scaler = VideoWriter(width, height, fps, Cut(chroma="444", crf=1)), Scaler(width, height, "yuv444p")
    try:
        for frame in frames:
            writer.add(scaler.from_rgb(np.ascontiguousarray(frame)))
        return writer.finish()
    finally:
        writer.close()


def sample(index: int, *, image: bool = False, rate: int | None = None) -> Sample:
    """A clip and its middle frame, with sound at a rate; or an image alone."""
    key, frames = make_key(str(index)), frames_of(scene(index), SIDE)
    jpg = encode_jpeg(frames[(FRAMES - 1) // 2])
    sound = {} if rate is None else {"flac": encode_flac(samples_of(scene(index), rate), rate)}
    parts = {} if image else {"mp4": mp4_of(frames)} | sound
    return Sample(key, jpg, {"key": key}, descriptive(scene(index)), parts)


def write_clips(folder: Path, counts: list[int], images: int = 0, rate: int | None = None) -> Path:
    """A finished dataset with shards of these many samples; the first `images` of each are images alone.

    Clips have sound at `rate`.
    """
    storage, entries, index = Storage(str(folder)), [], 0
    (folder / "shards").mkdir(parents=True)
    for number, count in enumerate(counts):
        name, tar = f"shard-{number:06d}", folder / f"shards/shard-{number:06d}.tar"
        samples = [sample(index + place, image=place < images, rate=rate) for place in range(count)]
        index += count
        places = write_samples(tar, samples)
        rows = [
            dict.fromkeys(("crop_left", "crop_top", "phash", "json_size"), 0)
            | dict.fromkeys(("width", "height", "original_width", "original_height"), SIDE)
            | {"key": one.key, "caption": one.caption, "url": f"http://x.test/{one.key}.mp4", "bytes": len(one.jpg)}
            | {"sha256": sha256_of(one.jpg), "colours": "", "extra": "{}"}
            | {"offset": place.offset, "size": place.size, "crc32": place.crc32}
            for one, place in zip(samples, places, strict=True)
        ]
        table = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
        kinds = ["mp4"] if rate is None else ["mp4", "flac"]
        for field in part_fields(kinds):
            table = table.append_column(field, part_columns([place.parts for place in places], kinds)[field.name])
        storage.write_table(f"shards/{name}.parquet", table)
        sums = {"sha256": sha256_of(tar.read_bytes())}
        sums["table_sha256"] = sha256_of(storage.read(f"shards/{name}.parquet"))
        entries.append(ShardEntry(name=name, samples=count, bytes=tar.stat().st_size, **sums))
    write_manifest(storage, Manifest(shards=entries))
    return folder
