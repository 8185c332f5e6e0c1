"""Source columns → plan columns: text, JSON and keys

Work is done a whole column at a time. `make_keys` returns for a table what `records.make_key` returns for each row.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final
from urllib.parse import unquote, unquote_to_bytes

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.records import PLAN_SCHEMA, make_key

_ESCAPED = r'["\\\x00-\x1f]'  # characters that JSON must escape (RFC 8259, section 7)


@dataclass(frozen=True)
class Row:
    """One input row, without its key. Fields as in PLAN_SCHEMA; `url` also identifies a row of a folder or a tar."""

    url: str = ""
    caption: str = ""
    image: bytes | None = None
    file: str = ""
    offset: int = 0
    length: int = 0
    extra: str = "{}"
    hash: str = ""
    facts: str = ""
    parts: str = ""

    @property
    def key(self) -> str:
        """The key: of the file that holds the image; or of its bytes and caption; or of its URL and caption.

        A row that has none of these (it will fail with a reason) is identified by all that it has.
        """
        if self.file:
            return make_key("file", self.url)
        if self.image:
            return make_key("image", self.image, self.caption)
        if self.url:
            return make_key(self.url, self.caption)
        return make_key("row", self.caption, self.extra)


def of_rows(rows: Sequence[Row]) -> pa.Table:
    """Return rows as a table of PLAN_SCHEMA."""
    return pa.table({name: [getattr(row, name) for row in rows] for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA)


def of_urls(url: pa.Array, caption: pa.Array, extra: pa.Array, hash_: pa.Array) -> pa.Table:
    """Return rows that have a URL as a table of PLAN_SCHEMA. All columns are text without nulls.

    A data: URI holds the image itself, so its row has the image in place of the URL.
    """
    keys, images = make_keys(url, caption), list[bytes | None]()
    inline = pc.indices_nonzero(pc.starts_with(pc.utf8_ltrim_whitespace(url), "data:", ignore_case=True)).to_pylist()
    if inline:
        urls = url.to_pylist()
        images = [None] * len(urls)
        for index in inline:
            images[index], urls[index] = decoded(urls[index]), ""
            keys[index] = Row("", caption[index].as_py(), images[index], extra=extra[index].as_py()).key
        url = pa.array(urls, pa.string())
    for index in pc.indices_nonzero(pc.equal(url, "")).to_pylist():
        if not images or images[index] is None:
            keys[index] = Row("", caption[index].as_py(), extra=extra[index].as_py()).key
    image = pa.array(images, pa.binary()) if images else pa.nulls(len(url), pa.binary())
    nothing = {"image": image} | dict.fromkeys(("file", "facts", "parts"), pa.repeat("", len(url)))
    zeros = pa.repeat(0, len(url)).cast(pa.int64())
    columns = {"key": keys, "url": url, "caption": caption, "extra": extra, "hash": hash_, **nothing}
    return pa.table({name: columns.get(name, zeros) for name in PLAN_SCHEMA.names}, schema=PLAN_SCHEMA)


def captions_in(rows: pa.Table) -> int:
    """Return how many rows have a caption."""
    return int(pc.sum(pc.not_equal(rows["caption"], "")).as_py() or 0)


def make_keys(*parts: pa.Array) -> list[str]:
    """Return `records.make_key` of each row of these text columns."""
    pieces = [piece for part in parts for piece in (_lengths(part), part.cast(pa.binary()))]
    messages = pc.binary_join_element_wise(*pieces, pa.scalar(b"", pa.binary()))
    return [blake2b(message, digest_size=16).hexdigest() for message in messages.to_pylist()]


def _lengths(text: pa.Array) -> pa.Array:
    """Return the number of bytes in each cell as 8-byte big-endian numbers."""
    numbers = pc.binary_length(text).to_numpy(zero_copy_only=False).astype(">u8")
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(8), len(text), [None, pa.py_buffer(numbers.tobytes())])
    return fixed.cast(pa.binary())


# Text ----------------------------------------------------------------------------------------------------------------


def text_of(value: Any) -> str:
    """Return a cell as text: None as "", bytes decoded as UTF-8. Anything that is not UTF-8 becomes question marks."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    text = value if isinstance(value, str) else str(value)
    return text.encode("utf-8", "replace").decode()  # lone surrogates do not pass through Arrow


def text_in_file(data: bytes) -> str:
    r"""Return the text of a file: UTF-16 with a byte order mark (Windows writes it), else UTF-8 with or without one.

    >>> text_in_file("größe".encode("utf-16")), text_in_file(b"\xef\xbb\xbfa cat"), text_in_file(b"a cat")
    ('größe', 'a cat', 'a cat')
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig", "replace")


NO_TEXT: Final = "unreadable_caption"
UNREADABLE: Final = "unreadable_line"


def caption_of(record: dict[str, Any], name: str) -> str:
    """Remove the caption from a JSON record and return it.

    A list, an object or a boolean is not a caption: it is kept in the record as NO_TEXT, which makes its row fail, and
    returned as JSON, so that the row has a key of its own.
    """
    value = one_of(record.pop(name, None))
    if isinstance(value, list | dict | bool):
        record[NO_TEXT] = value
        return to_json(value)
    return text_of(value)


def one_of(value: Any) -> Any:
    """Return the text in a list of one text; any other value as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def why_no_text(extra: str, caption: str) -> str:
    """Return why the caption of a row with this `extra` is none; "" if it is one.

    >>> why_no_text('{"unreadable_caption":["a","b"]}', '["a","b"]'), why_no_text('{"n":1}', "a cat")
    ('["a","b"] is not text', '')
    """
    if f'"{NO_TEXT}":' not in extra or NO_TEXT not in (fields := json.loads(extra)):
        return ""
    return fields[NO_TEXT] if isinstance(fields[NO_TEXT], str) else f"{caption[:200]} is not text"


def as_text(column: pa.Array) -> pa.StringArray:
    """Return `text_of` each cell."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary_decode())
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return pc.fill_null(column.cast(pa.string()), "")
    if not _is_text(kind) and not _is_bytes(kind):
        return pa.array([text_of(value) for value in column.to_pylist()], pa.string())
    try:  # Arrow's Parquet reader does not check that strings are UTF-8
        return pc.fill_null(column.cast(pa.binary()).cast(pa.string()), "")
    except pa.ArrowInvalid:
        return pa.array([text_of(value) for value in column.cast(pa.binary()).to_pylist()], pa.string())


def as_hash(column: pa.Array) -> pa.StringArray:
    """Return checksums as hexadecimal text, also if the cells hold their raw bytes."""
    if _is_bytes(column.type):
        return pa.array([value.hex() if value else "" for value in column.to_pylist()], pa.string())
    return pc.utf8_trim_whitespace(as_text(column))


def unlisted(column: pa.Array) -> pa.Array:
    """Return a column of lists of one as a column of their items; any other column as it is.

    Raises ValueError for a list of several items.
    """
    if not is_list(column.type):
        return column
    if (most := pc.max(pc.list_value_length(column)).as_py() or 0) > 1:
        raise ValueError(f"{column.type} with up to {most} items per row")
    return pa.array([cell[0] if cell else None for cell in column.to_pylist()], column.type.value_type)


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_words(kind: pa.DataType) -> bool:
    """Return whether cells are text or bytes (or nothing): as such, in a dictionary, or in lists."""
    kind = kind.value_type if is_list(kind) else kind
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or _is_bytes(kind) or bool(pa.types.is_null(kind))


def decoded(text: str) -> bytes:
    """Return the bytes in base64 or in a data: URI (RFC 2397); of any other text its own bytes.

    >>> decoded("data:image/gif;base64,R0lGODlh"), decoded("R0lGODlh"), decoded("data:,a%20b"), decoded("a cat.")
    (b'GIF89a', b'GIF89a', b'a b', b'a cat.')
    """
    body, packed = "".join(text.split()), True
    if body[:5].lower() == "data:":
        head, _, body = body.partition(",")
        packed = head.lower().endswith(";base64")
        body = unquote(body) if packed else body
    try:
        plain = base64.b64decode(body.rstrip("=") + "=" * (-len(body.rstrip("=")) % 4), altchars=None, validate=True)
    except (binascii.Error, ValueError):
        plain = text.encode("utf-8", "replace")
    return plain if packed else unquote_to_bytes(body)


def is_nested(kind: pa.DataType) -> bool:
    """Return whether cells are lists, structs, maps or the like: there is no single way to write them as text."""
    return bool(pa.types.is_nested(kind.value_type if pa.types.is_dictionary(kind) else kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    fixed = pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or fixed)


# JSON ----------------------------------------------------------------------------------------------------------------


def as_objects(columns: Mapping[str, pa.Array], count: int) -> pa.StringArray:
    """Return a JSON object for each of `count` rows, with the columns' names as its keys, sorted."""
    if not columns:
        return pa.repeat("{}", count)
    pieces: list[Any] = []
    for number, name in enumerate(sorted(columns)):
        pieces += [f"{',' if number else '{'}{to_json(name)}:", _as_json(columns[name])]
    return pc.binary_join_element_wise(*pieces, "}", "")


def to_json(value: Any) -> str:
    """Return compact JSON with sorted keys. Bytes are written in base64, NaN as null, other non-JSON types as text."""
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_finite(value))
    return text.encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    return str(value)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False, default=_plain)


def _finite(value: Any) -> Any:
    """Return `value` with None in place of NaN and the infinities, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _as_json(column: pa.Array) -> pa.StringArray:
    """Return each cell as JSON text: the same as `to_json`, but by columns where that is faster."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return pc.fill_null(column.cast(pa.string()), "null")
    if pa.types.is_floating(kind):
        finite = pc.if_else(pc.is_finite(column), column, None)
        text = json.dumps(finite.to_pylist(), separators=(",", ":"))[1:-1]
        return pa.array(text.split(",") if text else [], pa.string())
    if _is_text(kind):
        text = as_text(column)
        quoted = pc.binary_join_element_wise('"', text, '"', "")
        odd = pc.indices_nonzero(pc.match_substring_regex(text, _ESCAPED))
        if len(odd):
            escaped = pa.array([to_json(value) for value in text.take(odd).to_pylist()], pa.string())
            mask = pc.is_in(pa.array(range(len(text)), pa.uint64()), value_set=odd)
            quoted = pc.replace_with_mask(quoted, mask, escaped)
        return pc.if_else(column.is_valid(), quoted, "null")
    return pa.array([to_json(value) for value in column.to_pylist()], pa.string())
