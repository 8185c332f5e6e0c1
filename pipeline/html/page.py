"""Building blocks of a self-contained HTML page; all text is escaped

Captions are untrusted. Blocks have the type `Html`, which only the functions of this package create, so plain text
cannot be mistaken for it. The page has no script and loads nothing: its content security policy forbids both, so that
even a mistake in escaping could not run anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Final, NewType
from urllib.parse import quote

from PIL import Image

from capstan.pipeline.html.css import STYLE

Html = NewType("Html", str)  # escaped, safe to insert

# Characters that no text needs and that browsers may mishandle: control characters, lone surrogates, non-characters,
# and the marks that reverse the direction of all text after them.
_UNFIT: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_SMALL_SIDE: Final = 64  # pixels: images up to this size are shown enlarged, pixel by pixel


class Page:
    """A page that is built section by section; `html()` returns the whole file."""

    def __init__(self, title: str, *lead: Html) -> None:
        self._title, self._lead = title, lead
        self._sections: list[tuple[str, tuple[Html, ...]]] = []

    def section(self, title: str, *blocks: Html) -> None:
        """Add a section: a heading and the blocks below it."""
        self._sections.append((title, blocks))

    def html(self) -> str:
        """Return the page as one file."""
        # The policy names the style by its hash, so that no other style applies, inline ones included.
        style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
        blocks = "".join(block for _, section in self._sections for block in section)
        media = "media-src data:; " if 'class="player"' in blocks else ""
        policy = (
            f"default-src 'none'; img-src data:; {media}style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
        )
        head = [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">',
            f"<title>{escape(self._title)}</title><style>{STYLE}</style></head><body>",
            f"<header><h1>{user_text(self._title)}</h1>",
            *self._lead,
            f"</header>{self._contents()}<main>",
        ]
        body = [
            f'<section id="s{number}"><h2>{escape(title)}</h2>{"".join(blocks)}</section>'
            for number, (title, blocks) in enumerate(self._sections, 1)
        ]
        return "\n".join([*head, *body, "</main></body></html>\n"])

    def _contents(self) -> Html:
        links = (f'<a href="#s{number}">{escape(title)}</a>' for number, (title, _) in enumerate(self._sections, 1))
        return Html(f'<nav aria-label="Sections">{" ".join(links)}</nav>')


# Texts ----------------------------------------------------------------------------------------------------------------


def clean(text: object) -> str:
    """Replace every character that is unfit for display with �."""
    return _UNFIT.sub("\ufffd", str(text))


def clip(text: str, most: int) -> str:
    """Return `text` on one line, cut to at most `most` characters.

    >>> clip("an image  of a cat", 12)
    'an image o…'
    """
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else line[: most - 1] + "…"


def escape(text: object) -> Html:
    """Escape text for any place in the page, including quoted attributes."""
    return Html(html.escape(clean(text), quote=True))


def user_text(text: object) -> Html:
    """Escape untrusted text and isolate its writing direction from its surroundings."""
    return Html(f"<bdi>{escape(text)}</bdi>")


def link(text: str, file: str) -> Html:
    """Return a link to a file next to the page or in a folder below it, never to a URL."""
    return Html(f'<a href="./{escape(quote(file))}">{user_text(text)}</a>')


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escape(text)}</p>")


def note(text: str) -> Html:
    """Return a paragraph in a softer colour."""
    return Html(f'<p class="soft">{escape(text)}</p>')


def commands(*lines: str) -> Html:
    """Return commands to type, one per line."""
    return Html(f"<pre>{escape(chr(10).join(lines))}</pre>")


def marked(text: str, words: Container[str]) -> Html:
    """Return text in which the words that are in `words` (in lower case) are marked."""
    parts = re.split(r"([^\W_]+)", text)
    return Html(
        "<bdi>" + "".join(f"<mark>{escape(p)}</mark>" if p.lower() in words else escape(p) for p in parts) + "</bdi>"
    )


def heading(text: str, code: str = "") -> Html:
    """Return a heading inside a section, followed by `code` in a code font."""
    return Html(f"<h3>{user_text(text)}{_code(code)}</h3>")


def _code(text: str) -> str:
    return f" <code>{user_text(text)}</code>" if text else ""


def number(value: Any) -> str:
    """Format a number for people: 12,345 or 0.873; None becomes a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(part: float, whole: float) -> str:
    """
    >>> percent(1, 3), percent(1, 100_000), percent(0, 0)
    ('33.3%', '<0.1%', '–')
    """
    if not whole:
        return "–"
    share = 100 * part / whole
    return "<0.1%" if 0 < share < 0.1 else f"{share:.1f}%"


def plain(value: Any) -> str:
    """Return plain data as JSON text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


# Blocks ---------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Return a table that scrolls in its own box; columns of numbers and percentages are right-aligned.

    Values are escaped, except for the blocks in `Cell`.
    """
    rows = list(rows)
    right = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    top = "".join(f'<th scope="col"{_side(r)}>{escape(name)}</th>' for name, r in zip(header, right, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{_side(r)}>{_cell(value)}</td>" for value, r in zip(row, right, strict=True)) + "</tr>"
        for row in rows
    )
    box = f'<div class="wide" tabindex="0" role="region" aria-label="{escape("Table: " + ", ".join(header))}">'
    return Html(f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")


class Cell:
    """A table cell that holds a block."""

    def __init__(self, block: Html) -> None:
        self.block = block


def _cell(value: Any) -> Html:
    return value.block if isinstance(value, Cell) else user_text(number(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value is None or (isinstance(value, str) and value.endswith("%"))


def _side(right: bool) -> str:
    return " class=number" if right else ""


def figures(values: Mapping[str, str]) -> Html:
    """Return a few key figures in large type."""
    parts = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return Html(f'<dl class="figures">{"".join(parts)}</dl>')


def details(title: str, text: str) -> Html:
    """Return collapsed text."""
    return Html(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")


def grid(blocks: Iterable[Html]) -> Html:
    """Return blocks side by side, as many per row as fit."""
    return Html(f'<div class="grid">{"".join(blocks)}</div>')


# Images -------------------------------------------------------------------------------------------------------------


def image(data: bytes, alt: str) -> Html:
    """Return a JPEG or PNG embedded in the page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    pixels = ' class="pixels"' if max(width, height) <= _SMALL_SIDE else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Html(f'<img{pixels} width="{width}" height="{height}" alt="{escape(alt)}" src="{source}">')


def player(data: bytes, poster: bytes, text: str) -> Html:
    """Return a clip (MP4) or a sound (WAV) embedded in the page, with an image of all of it, and its text."""
    tag, kind = ("audio", "audio/wav") if data.startswith(b"RIFF") else ("video", "video/mp4")
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    label = escape(f"{'sound' if tag == 'audio' else 'clip'}: {text}")
    media = f'<{tag} controls loop preload="metadata" aria-label="{label}" src="{source}"></{tag}>'
    shown = image(poster, f"all of the {'sound' if tag == 'audio' else 'clip'}: {text}")
    return Html(f'<figure class="player">{media}{shown}<figcaption><p>{user_text(text)}</p></figcaption></figure>')


def frame(data: bytes | None, alt: str, missing: str = "no image") -> Html:
    """Return an image in a square, or the reason why it is missing."""
    inner = (
        image(data, alt.strip() or "an image without a caption") if data else Html(f"<span>{user_text(missing)}</span>")
    )
    return Html(f'<div class="frame{"" if data else " none"}">{inner}</div>')


def card(image: Html, text: str, *facts: str, key: str = "") -> Html:
    """Return a framed image with its caption, and small facts below; a click selects all of its `key`."""
    lines = "".join(f"<small>{user_text(fact)}</small>" for fact in facts if fact) + _key(key)
    shown = user_text(text) if text.strip() else Html("<i>no caption</i>")
    return Html(f"<figure>{image}<figcaption><p>{shown}</p>{lines}</figcaption></figure>")


def _key(key: str) -> str:
    return f'<small class="key">{escape(key)}</small>' if key else ""


def pair(left: tuple[Html, str], right: tuple[Html, str], *facts: str, keys: Sequence[str] = ()) -> Html:
    """Return two framed images side by side, each with a word above it, and facts and keys below."""
    sides = "".join(f"<div><b>{escape(word)}</b>{image}</div>" for image, word in (left, right))
    lines = "".join(f"<small>{user_text(fact)}</small>" for fact in facts if fact) + "".join(map(_key, keys))
    return Html(f'<figure class="pair"><div class="sides">{sides}</div><figcaption>{lines}</figcaption></figure>')


def gallery(blocks: Iterable[Html], *, wide: bool = False) -> Html:
    """Return cards (or pairs, with `wide`) in even columns."""
    return Html(f'<div class="gallery{" pairs" if wide else ""}">{"".join(blocks)}</div>')


def sheet(header: Sequence[str], rows: Iterable[tuple[str, Sequence[Html]]]) -> Html:
    """Return rows of images, each with a text in front of it, which stays in view; it scrolls in its own box."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *header))
    body = "".join(
        f'<tr><th scope="row">{user_text(text)}</th>{"".join(f"<td>{block}</td>" for block in blocks)}</tr>'
        for text, blocks in rows
    )
    box = f'<div class="wide sheet" tabindex="0" role="region" aria-label="{escape("Images: " + ", ".join(header))}">'
    return Html(f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")


def strip(images: Iterable[tuple[bytes, str]], text: str) -> Html:
    """Return images of one thing side by side, each with a word below it, and a text below all."""
    shown = ((frame(data, f"{text}: {word}" if word else text), escape(word)) for data, word in images)
    sides = "".join(f"<div>{image}<small>{word}</small></div>" for image, word in shown)
    return Html(f'<figure class="strip"><div>{sides}</div><figcaption>{user_text(text)}</figcaption></figure>')


def cards(items: Iterable[tuple[bytes, Mapping[str, str | Cell]]]) -> Html:
    """Return images, each next to its named texts; the first describes it."""
    made = []
    for data, texts in items:
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{_cell(text)}</dd>" for name, text in texts.items())
        first = next(iter(texts.values()), "")
        image = frame(data, "" if isinstance(first, Cell) else first)
        made.append(f"<figure>{image}<figcaption><dl>{lines}</dl></figcaption></figure>")
    return Html(f'<div class="cards">{"".join(made)}</div>')
