"""Images whose metadata forbids training are refused, in every format that can say so; hostile files do no harm."""

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows_recipe import build, rows_recipe

from capstan.pipeline import config
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.image import cbor
from capstan.pipeline.image.decode import Failure, StoredImage, decode
from capstan.pipeline.image.opt_out import opt_out
from capstan.pipeline.storage import Storage

PLUS = "http://ns.useplus.org/ldf/vocab/"


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((80, 80)).convert("RGB").save(file, kind)
    return file.getvalue()


def xmp(value: str, *, form: str = "element") -> bytes:
    forms = {
        "element": f"<rdf:Description><plus:DataMining>{value}</plus:DataMining></rdf:Description>",
        "attribute": f'<rdf:Description xmlns:p="http://ns.useplus.org/ldf/xmp/1.0/" p:DataMining="{value}"/>',
        "resource": f'<rdf:Description><plus:DataMining rdf:resource="{value}"/></rdf:Description>',
    }
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>{forms[form]}</rdf:RDF></x:xmpmeta>'.encode()


def encoded(value: object) -> bytes:
    """Return CBOR of texts and maps."""
    if isinstance(value, str):
        raw = value.encode()
        return (bytes([0x60 | len(raw)]) if len(raw) < 24 else bytes([0x78, len(raw)])) + raw
    assert isinstance(value, dict)
    return bytes([0xA0 | len(value)]) + b"".join(encoded(k) + encoded(v) for k, v in value.items())


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body) + 8) + kind + body


def labelled(label: str, *content: bytes) -> bytes:
    return box(b"jumb", box(b"jumd", bytes(16) + b"\3" + label.encode() + b"\0") + b"".join(content))


def store(use: str, name: str = "ai_training", label: str = "c2pa.training-mining", *, as_json: bool = False) -> bytes:
    """A manifest store with one manifest, whose assertion store has one assertion of training and mining."""
    value = {"entries": {f"{label.partition('.')[0]}.{name}": {"use": use}}}
    content = box(b"json", json.dumps(value).encode()) if as_json else box(b"cbor", encoded(value))
    other = labelled("c2pa.actions", box(b"cbor", encoded({"actions": "none"})))
    return labelled("c2pa", labelled("urn:uuid:1", labelled("c2pa.assertions", other, labelled(label, content))))


def with_c2pa(kind: str, jumbf: bytes, part: int = 60_000) -> bytes:
    data = picture(kind)
    if kind == "JPEG":
        pieces = [jumbf[:part], *(jumbf[:8] + jumbf[at : at + part] for at in range(part, len(jumbf), part))]
        segments = [b"JP\0\1" + struct.pack(">I", n) + piece for n, piece in enumerate(pieces, 1)]
        return data[:2] + b"".join(b"\xff\xeb" + struct.pack(">H", len(s) + 2) + s for s in segments) + data[2:]
    if kind == "PNG":
        return with_chunk(data, b"caBX", jumbf)
    if kind == "WEBP":
        return with_riff(data, b"C2PA", jumbf)
    uuid = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")
    return data + box(b"uuid", uuid + bytes(4) + b"manifest\0" + bytes(8) + jumbf)  # AVIF


def with_xmp(kind: str, packet: bytes, *, compressed: bool = False) -> bytes:
    data = picture(kind)
    if kind == "JPEG":
        body = b"http://ns.adobe.com/xap/1.0/\0" + packet
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    if kind == "PNG":
        head = b"XML:com.adobe.xmp\0" + (b"\1\0" if compressed else b"\0\0") + b"\0\0"
        return with_chunk(data, b"iTXt", head + (zlib.compress(packet) if compressed else packet))
    return with_riff(data, b"XMP ", packet)


def with_chunk(data: bytes, name: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:33] + chunk + data[33:]


def with_riff(data: bytes, name: bytes, body: bytes) -> bytes:
    data += name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


def outcome(data: bytes) -> str:
    result = decode(data, config.Image(), noai=True)
    return result.detail if isinstance(result, Failure) and result.reason == "noai" else type(result).__name__


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_c2pa_is_read_in_every_format(kind: str) -> None:
    assert outcome(with_c2pa(kind, store("notAllowed"))) == "C2PA c2pa.training-mining: c2pa.ai_training notAllowed"
    assert outcome(with_c2pa(kind, store("allowed"))) == "StoredImage"


def test_other_versions_of_the_assertion() -> None:
    told = "C2PA cawg.training-mining: cawg.data_mining constrained"
    assert outcome(with_c2pa("JPEG", store("constrained", "data_mining", "cawg.training-mining"))) == told
    assert "notAllowed" in outcome(with_c2pa("JPEG", store("notAllowed", label="c2pa.training-mining__1")))
    assert "notAllowed" in outcome(with_c2pa("PNG", store("notAllowed", as_json=True)))
    assert outcome(with_c2pa("JPEG", store("notAllowed", "ai_inference"))) == "StoredImage"
    assert outcome(with_c2pa("JPEG", store("notAllowed", label="c2pa.training"))) == "StoredImage"


def test_a_store_that_a_jpeg_has_in_many_segments() -> None:
    assert "notAllowed" in outcome(with_c2pa("JPEG", store("notAllowed"), part=37))


@pytest.mark.parametrize("form", ["element", "attribute", "resource"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_iptc_is_read_in_every_form(kind: str, form: str) -> None:
    for value in ("DMI-PROHIBITED", "DMI-PROHIBITED-AIMLTRAINING", "DMI-PROHIBITED-SEECONSTRAINT"):
        assert outcome(with_xmp(kind, xmp(PLUS + value, form=form))) == f"IPTC Data Mining: {value}"
    for value in ("DMI-ALLOWED", "DMI-UNSPECIFIED"):
        assert outcome(with_xmp(kind, xmp(PLUS + value, form=form))) == "StoredImage"


def test_compressed_xmp_of_a_png_and_a_bomb() -> None:
    assert "PROHIBITED" in outcome(with_xmp("PNG", xmp(PLUS + "DMI-PROHIBITED"), compressed=True))
    assert outcome(with_xmp("PNG", b"a" * (16 << 20), compressed=True)) == "StoredImage"


def test_it_can_be_turned_off_and_metadata_is_stripped_all_the_same() -> None:
    stored = decode(with_c2pa("JPEG", store("notAllowed")), config.Image())
    assert isinstance(stored, StoredImage)
    assert b"training" not in stored.jpeg


def test_a_build_says_noai_in_the_ledger(tmp_path: Path, draw: Callable[[int], bytes]) -> None:
    rows = [{"image": draw(1), "caption": "free"}, {"image": with_c2pa("PNG", store("notAllowed")), "caption": "not"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rights.parquet")
    source = {"path": str(tmp_path / "rights.parquet"), "image": "image"}
    recipe = rows_recipe(tmp_path, draw, 1, source=source, select=[])
    assert build(recipe)["failed"] == {"noai": 1}
    ledger = Dataset(Storage(recipe.dataset)).ledger(["caption", "reason", "detail"]).to_pylist()
    assert {row["caption"]: row["reason"] for row in ledger} == {"free": "", "not": "noai"}
    assert "noai" not in recipe.model_dump(mode="json")["fetch"]  # recipes of earlier versions keep their hash


WHOLE = store("notAllowed")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=9), st.sampled_from(["jpeg", "png", "webp", "avif"])
)
def test_damaged_metadata_is_never_an_error(at: int, dirt: bytes, kind: str) -> None:
    data = with_c2pa(kind.upper(), WHOLE[:at] + dirt + WHOLE[at + len(dirt) :])
    assert isinstance(opt_out(kind, data), str)
    assert isinstance(opt_out(kind, data[: len(data) - at]), str)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        cbor.loads(data)


@pytest.mark.parametrize(
    "data",
    [b"\x81" * 1_000, b"\x9f" * 1_000, b"\x9b" + b"\xff" * 8, b"\x7b" + b"\xff" * 8, b"\x9a\0\1\0\0" + b"\0" * 65_000],
    ids=["deep", "endless", "long array", "long text", "many items"],
)
def test_cbor_has_bounds(data: bytes) -> None:
    with pytest.raises(ValueError, match="CBOR"):
        cbor.loads(data)


def test_a_file_full_of_boxes_or_names_takes_no_time() -> None:
    """Bounds on what is walked; without them these take minutes."""
    assert opt_out("png", with_c2pa("PNG", box(b"jumb", b"\0\0\0\x08free" * 500_000))) == ""
    nested = b""
    for _ in range(2_000):
        nested = box(b"jumb", nested)
    assert opt_out("png", with_c2pa("PNG", nested)) == ""
    assert opt_out("tiff", b"DataMining DMI " * 500_000) == ""
