"""What crosses all stages: keys, outcomes, failure reasons and the Arrow schemas of the tables.

Loads neither torch nor ray, so that any tool can read what Capstan wrote.
"""

from __future__ import annotations

import hashlib
from typing import Final

import pyarrow as pa

FORMAT_VERSION: Final = 3

# Outcome of an input row (contract: one ledger row for every input row).
KEPT: Final = "kept"
REJECTED: Final = "rejected"
DUPLICATE: Final = "duplicate"
FAILED: Final = "failed"
OUTCOMES: Final = (KEPT, REJECTED, DUPLICATE, FAILED)

# The reason of rows that were rejected because of a takedown or a blocklist, in staged tables and in the ledger.
REMOVED: Final = "removed"

# Why a row failed. `http_<status>` stands beside these.
_REASONS = """
    bad_url private_address dns connect tls timeout redirects robots noai too_large_bytes empty not_an_image
    unsupported truncated corrupt too_many_pixels too_small bad_caption read_error
"""
REASONS: Final = frozenset(_REASONS.split())


def is_reason(reason: str) -> bool:
    """Whether `reason` is one of the failure reasons that users may rely on.

    >>> is_reason("timeout"), is_reason("http_404"), is_reason("because")
    (True, True, False)
    """
    return reason in REASONS or (reason.startswith("http_") and reason[5:].isdigit())


def storable(text: str) -> str:
    """What a server, a codec or the system said, as text that Arrow can hold. Bytes that are not UTF-8, of headers or
    names of files, come as lone surrogates; they become question marks.

    >>> storable("404 Non trouv\\udce9")
    '404 Non trouv?'
    """
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def make_key(*parts: str | bytes) -> str:
    """The 128-bit BLAKE2b of where a sample comes from, as 32 hexadecimal digits.

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


# What planning hands to ingest: one row a key, sorted by key. The image is embedded in `image`; or else it is the
# `length` bytes at `offset` of `file`; or else, where `file` is "", it is fetched from `url`. So an address in a table
# can never name a local file. `extra` is a JSON object of the source's other columns. `hash` is what the source says of
# the image's bytes (hexadecimal md5, sha1, sha256 or sha512), or "".
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
    ]
)

# Sizes in pixels of the stored image and of the source (as a viewer shows it), 0 where unknown; `crop_left` and
# `crop_top` are the pixels of the scaled image that were cut off there (negative: padded);
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

# One row an input row. `unit` names the staged unit, `shard` the packed shard ("" unless kept).
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

# One row a sample, in tar order: shards/shard-000000.parquet. `offset` and `size` locate the JPEG's bytes in the tar;
# `json_size` is that of KEY.json, whose header begins at the next multiple of 512 bytes.
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
    ]
)


def with_scores(schema: pa.Schema, scores: list[pa.Field], metadata: dict[str, str] | None = None) -> pa.Schema:
    """LEDGER_SCHEMA or SHARD_SCHEMA with what the recipe's scorers add, at the end."""
    return pa.schema([*schema, *scores], metadata=metadata)
