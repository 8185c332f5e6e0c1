"""Does an image file say that no model may be trained on it? By IPTC and PLUS in XMP, or by C2PA

    XMP     plus:DataMining is DMI-PROHIBITED or one of its kinds (IPTC Photo Metadata Standard 2023.1)
    C2PA    an assertion c2pa.training-mining or cawg.training-mining by which AI training, generative training or data
            mining is notAllowed or constrained: no program can tell whether a constraint in words is met

Signatures are not checked: a reservation counts whoever made it. It counts in every manifest of the store, also in
those of the images that this one was made from.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from capstan.pipeline.image import cbor
from capstan.pipeline.image.metadata import blocks

_MINING: Final = re.compile(rb"DataMining\b[^<]{0,300}?\b(DMI-[A-Z-]+)")  # an element, an attribute or rdf:resource
_MOST_NAMED: Final = 1_000  # times that one file may name the property
_PROHIBITED: Final = b"DMI-PROHIBITED"
_ASSERTION: Final = re.compile(rb"(?:c2pa|cawg)\.training-mining(?:\.v\d+)?(?:__\d+)?\Z")
_USES: Final = frozenset({"ai_training", "ai_generative_training", "data_mining"})  # what a dataset is made for
_FORBIDDING: Final = frozenset({"notAllowed", "constrained"})
_TOGGLE_LABEL: Final = 2
_MOST_BOXES: Final = 10_000
_MOST_DEPTH: Final = 8
_MOST_JSON: Final = 64 << 10


def opt_out(kind: str, data: bytes) -> str:
    """Return what forbids training on the image file of a kind of `sniff`; "" if nothing does."""
    xmp, boxes = blocks(kind, data)
    for named in itertools.islice(re.finditer(b"DataMining", xmp), _MOST_NAMED):
        found = _MINING.match(xmp, named.start(), named.start() + 400)
        if found is not None and found[1].startswith(_PROHIBITED):
            return f"IPTC Data Mining: {found[1].decode()}"
    return next((why for box in boxes for why in _of_c2pa(box)), "")


def _of_c2pa(data: bytes) -> Iterator[str]:
    """Yield what the assertions in a JUMBF superbox forbid."""
    for label, content_type, content in _assertions(data):
        entries = _entries(content_type, content)
        for name, entry in entries.items():
            use = entry.get("use") if isinstance(entry, Mapping) else None
            if str(name).rpartition(".")[2] in _USES and use in _FORBIDDING:
                yield f"C2PA {label}: {name} {use}"[:200]


def _assertions(data: bytes) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield label, content type and content of the training-mining assertions, at any depth."""
    left = _MOST_BOXES
    stack = [(data, 0, b"")]
    while stack and left:
        body, depth, label = stack.pop()
        for kind, content in _boxes(body):
            left -= 1
            if not left:
                return
            if kind == b"jumd":
                label = content[17:].partition(b"\0")[0] if content[16:17] and content[16] & _TOGGLE_LABEL else b""
            elif kind == b"jumb" and depth < _MOST_DEPTH:
                stack.append((content, depth + 1, b""))
            elif kind in (b"cbor", b"json") and _ASSERTION.match(label):
                yield label.decode(), kind, content


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of the boxes in `data` (ISO/IEC 14496-12, 4.2); a damaged one ends them."""
    at = 0
    while at + 8 <= len(data):
        size, header = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = len(data) - at
        if size < header:
            return
        yield data[at + 4 : at + 8], data[at + header : at + size]
        at += size


def _entries(kind: bytes, content: bytes) -> Mapping[Any, Any]:
    """Return the entries of an assertion: name → {use, …}; {} if it cannot be read."""
    try:
        value = cbor.loads(content) if kind == b"cbor" else json.loads(content[:_MOST_JSON])
    except (ValueError, RecursionError):
        return {}
    entries = value.get("entries") if isinstance(value, Mapping) else None
    return entries if isinstance(entries, Mapping) else {}
