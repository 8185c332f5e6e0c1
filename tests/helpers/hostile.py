"""Rows that would run, restyle or redirect a page which showed their texts as they are; and what else a report shows:
rows that fail, that a condition drops, and that repeat others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RUNS = "window.ran = 1"

CAPTIONS = [
    f"<script>{RUNS}; console.error('ran')</script>",
    f"</title><script>{RUNS}</script>",
    f'"><img src=x onerror="{RUNS}">',
    f"' onmouseover='{RUNS}' onfocus='{RUNS}' autofocus x='",
    f"</bdi></figure></section></main><svg onload={RUNS}><script>{RUNS}</script>",
    "</style><style>body { display: none }</style>",
    "<meta http-equiv=refresh content='0; url=http://127.0.0.1:9/'>",
    f"<iframe srcdoc='<script>parent.{RUNS}</script>'></iframe><base href=//127.0.0.1:9/>",
    f"<!-- <![CDATA[ &lt;script&gt;{RUNS}&#60;/script&#62; -->",
    f"javascript:{RUNS}",
    "an exe\u202egnp.erutcip\u2066 that reads \u2067backwards",
    "a zero \x00 byte, an escape \x1b[31m, a bell \x07 and \x85 \ufffe",
    "one million letters: " + "m" * 1_000_000,
    "<b>" * 300_000,
    "",
    "  \n\t ",
]
ADDRESSES = [
    f"javascript:{RUNS}",
    f'http://a.example/"><script>{RUNS}</script>',
    f"data:text/html,<script>{RUNS}</script>",
    f"http://<img src=x onerror={RUNS}>.example/x.jpg",
    "http://user:secret@host.example:8080/x.jpg?a=<b>",
    "",
]
ROWS = 64


def row(number: int, draw: Callable[[int], bytes]) -> dict[str, Any]:
    """Row 9, 19, … is no image; 7, 15, … repeat image 0 (row 0 has it first, or another by key); the rest are
    images of their own. `score` runs through 0 … 0.9.
    """
    image = b"<script>no image</script>" if number % 10 == 9 else draw(0 if number % 8 == 7 else number)
    caption, url = CAPTIONS[number % len(CAPTIONS)], ADDRESSES[number % len(ADDRESSES)]
    return {"image": image, "caption": caption, "url": url, "number": number, "score": number % 10 / 10}


def recipe(folder: str, table: str) -> dict[str, Any]:
    """A recipe with two conditions, one of which a single number decides."""
    return {
        "dataset": f"{folder}/<i onclick=alert(1)>data & 'set'",
        "source": {"path": table, "image": "image"},
        "image": {"size": 96},
        "select": [
            {"name": "score", "where": "(extra->>'$.score')::DOUBLE >= 0.3"},
            {"name": "shown", "where": f"caption NOT LIKE '%CDATA%' OR '<script>{RUNS}</script>' = ''"},
        ],
        "unit": {"rows": 20},
        "shards": {"samples": 20},
    }
