"""Keys, outcomes, failure reasons, and the Arrow schemas of all tables

Imports neither torch nor ray, so that any tool can read what Capstan wrote.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa

FORMAT_VERSION: Final = 4  # rises if old and new tables must not be mixed; 4: phash by exact areas

# Outcome of an input row (contract: one ledger row for every input row).
KEPT: Final = "kept"
REJECTED: Final = "rejected"
DUPLICATE: Final = "duplicate"
FAILED: Final = "failed"
OUTCOMES: Final = (KEPT, REJECTED, DUPLICATE, FAILED)

# The reason of rows rejected because of a takedown or a blocklist, in staged tables and in the ledger.
REMOVED: Final = "removed"

# Why a row failed. `http_<status>` is added to these.
_REASONS = """
    bad_url private_address dns connect tls timeout redirects robots noai too_large_bytes empty not_an_image
    unsupported truncated corrupt too_many_pixels too_small bad_caption read_error
    no_video no_sound too_long no_clip
"""
REASONS: Final = frozenset(_REASONS.split())


def is_reason(reason: str) -> bool:
    """Return whether `reason` is one of the documented failure reasons.

    >>> is_reason("timeout"), is_reason("http_404"), is_reason("because")
    (True, True, False)
    """
    return reason in REASONS or (reason.startswith("http_") and reason[5:].isdigit())


def storable(text: str) -> str:
    """Return a message of a server, a codec or the system as text that Arrow can hold.

    Bytes of headers or file names that are not UTF-8 arrive as lone surrogates; they become question marks.

    >>> storable("404 Non trouv\\udce9")
    '404 Non trouv?'
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def make_key(*parts: str | bytes) -> str:
    """Return the 128-bit BLAKE2b of a sample's origin (`parts`) as 32 hexadecimal digits.

    Each part is preceded by its length, so that ("ab", "c") and ("a", "bc") differ.

    >>> len(make_key("http://example.org/a.jpg", "a cat"))
    32
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
    return digest.hexdigest()


# Planned rows, input of ingest: one row per key, sorted by key. The image is embedded in `image`; or it is the `length`
# bytes at `offset` of `file`; or, if `file` is "", it is fetched from `url`. So a URL in a table can never name a local
# file. `extra` is a JSON object of the source's other columns. `hash` is the expected hash of the image's bytes
# (hexadecimal md5, sha1, sha256 or sha512), or "". `facts` is a JSON object of MEASURED and CRC32, by the table of the
# shard that the image is in, or "" (pipeline.dataset.own_shards). `parts` is a JSON object, suffix →
# [offset, length] of other files of the sample in `file`; or "".
PLAN_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=True),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("extra", pa.string(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("facts", pa.string(), nullable=False),
        pa.field("parts", pa.string(), nullable=False),
    ]
)

# Sizes in pixels of the stored image and of the source (as a viewer shows it), 0 where unknown; `crop_left` and
# `crop_top` are the pixels of the scaled image that were cut off at these sides (negative: padded);
# `bytes` and `sha256` are of the source file; `phash` is the 64-bit DCT perceptual hash, `colours` the mean RGB of
# 4 × 4 cells in base64 ("" where unknown).
MEASURED: Final = [
    pa.field("width", pa.int32(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("original_width", pa.int32(), nullable=False),
    pa.field("original_height", pa.int32(), nullable=False),
    pa.field("crop_left", pa.int32(), nullable=False),
    pa.field("crop_top", pa.int32(), nullable=False),
    pa.field("bytes", pa.int64(), nullable=False),
    pa.field("sha256", pa.string(), nullable=False),
    pa.field("phash", pa.uint64(), nullable=False),
    pa.field("colours", pa.string(), nullable=False),
]

# One row per input row. `unit` names the staged unit, `shard` the packed shard ("" unless kept).
LEDGER_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        *MEASURED,
        pa.field("extra", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
    ]
)

# The CRC-32 of a stored JPEG, checked whenever it is read; null if there is no image, or in files of older versions.
CRC32: Final = pa.field("crc32", pa.uint32())

# One row per sample, in tar order: shards/shard-000000.parquet. `offset` and `size` locate the JPEG's bytes in the tar;
# `json_size` is the size of KEY.json, whose header starts at the next multiple of 512 bytes.
SHARD_SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        *MEASURED,
        pa.field("extra", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("json_size", pa.int64(), nullable=False),
        CRC32,
    ]
)


def with_scores(schema: pa.Schema, scores: list[pa.Field], metadata: dict[str, str] | None = None) -> pa.Schema:
    """Return LEDGER_SCHEMA or SHARD_SCHEMA with the columns of the recipe's scorers appended."""
    return pa.schema([*schema, *scores], metadata=metadata)
