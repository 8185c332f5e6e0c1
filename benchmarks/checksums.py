"""The cost of file checks, as shares of building and of loading an image.

    python benchmarks/checksums.py

Building is decoding a source JPEG and encoding it at 256 pixels; loading is decoding the stored JPEG. The checks are a
CRC-32 of each stored JPEG (once when it is staged, once when it is packed, once when it is read) and the checksums of
the tables' pages.
"""

from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image as PillowImage

from capstan.pipeline.config import Image
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.records import SHARD_SCHEMA

COUNT = 200  # images
ROWS = 10_000
ROUNDS = 5


def photo(seed: int) -> bytes:
    """Return a JPEG of 740 × 556 pixels and about 100 kB: smooth shapes with some noise, like a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    smooth = np.asarray(PillowImage.fromarray(coarse).resize((740, 556), PillowImage.Resampling.BICUBIC)).astype(int)
    pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "JPEG", quality=88)
    return file.getvalue()


def best(action: Callable[[], object]) -> float:
    """Return the seconds of the fastest of ROUNDS runs."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    sources = [photo(seed) for seed in range(COUNT)]
    settings = Image(size=256)
    stored = [found.jpeg for found in (decode(data, settings) for data in sources) if isinstance(found, StoredImage)]
    assert len(stored) == COUNT
    build_s = best(lambda: [decode(data, settings) for data in sources]) / COUNT
    load_s = best(lambda: [simplejpeg.decode_jpeg(jpeg) for jpeg in stored]) / COUNT
    crc_s = best(lambda: [zlib.crc32(jpeg) for jpeg in stored]) / COUNT
    rows = [{f.name: "x" * 40 if f.type == pa.string() else n for f in SHARD_SCHEMA} for n in range(ROWS)]
    table = pa.Table.from_pylist(rows, SHARD_SCHEMA)

    def written(checked: bool) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file, compression="zstd", write_page_checksum=checked)
        return file.getvalue()

    data = written(True)
    write_s = (best(lambda: written(True)) - best(lambda: written(False))) / ROWS
    plain_s = best(lambda: pq.ParquetFile(io.BytesIO(data)).read())
    read_s = (best(lambda: pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()) - plain_s) / ROWS
    tables_s = max(0.0, 3 * write_s) + max(0.0, 8 * read_s)  # staged, ledger and shard tables; each read a few times
    print(
        json.dumps(
            {
                "source_bytes": sum(map(len, sources)) // COUNT,
                "stored_bytes": sum(map(len, stored)) // COUNT,
                "build_ms": round(build_s * 1e3, 3),
                "load_ms": round(load_s * 1e3, 3),
                "crc32_ms": round(crc_s * 1e3, 4),
                "tables_ms": round(tables_s * 1e3, 5),
                "share_of_building": round((3 * crc_s + tables_s) / build_s, 4),
                "share_of_loading": round((crc_s + max(0.0, read_s)) / load_s, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
