"""Building blocks of a self-contained HTML page. Every text that goes in is escaped: captions are untrusted.

Light and dark, narrow and wide; nothing is loaded from elsewhere. Blocks are strings of safe HTML; only the functions
here make them.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667; --line: #d9dce1; --paper: #fff; --bar: #3b6fd4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --line: #353b43; --paper: #14171a; --bar: #6d9cf5; }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0 0 .2rem; font-size: 1.7rem } h2 { margin: 2.6rem 0 .6rem; font-size: 1.2rem }
p { margin: .4rem 0 1rem; max-width: 46rem } .soft, figcaption { color: var(--soft); font-size: .9rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 600; color: var(--soft) } td.number, th.number { text-align: right }
.bar { height: .7rem; min-width: 1px; border-radius: 2px; background: var(--bar) }
td.drawn { width: 40%; min-width: 8rem; vertical-align: middle }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.2rem }
figure { margin: 0 } img { max-width: 100%; height: auto; border-radius: 3px }
.cards img { width: 9rem; image-rendering: auto }
dl { margin: .3rem 0 0 } dt { color: var(--soft); font-size: .8rem } dd { margin: 0 0 .4rem; overflow-wrap: anywhere }
"""

_PLOT: Final = {"margin": {"l": 50, "r": 16, "t": 36, "b": 40}, "height": 300, "paper_bgcolor": "rgba(0,0,0,0)"}


class Page:
    """A page that grows section by section; `html()` is the whole file."""

    def __init__(self, title: str, lead: str) -> None:
        self._title, self._parts, self._plots = title, [f"<h1>{escape(title)}</h1>", paragraph(lead)], 0

    def section(self, title: str, *blocks: str) -> None:
        """A heading and what stands beneath it."""
        self._parts += [f"<section><h2>{escape(title)}</h2>", *blocks, "</section>"]

    def curves(self, title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], y: str) -> str:
        """A plot of named lines, each (x, y). Plotly is put into the page once, with the first plot."""
        import plotly.graph_objects as go
        import plotly.io

        figure = go.Figure(
            [go.Scatter(x=list(x), y=list(v), name=name, mode="lines") for name, (x, v) in lines.items()]
        )
        grid = {"gridcolor": "rgba(128,128,128,.25)", "zeroline": False}
        figure.update_layout(**_PLOT, title=title, plot_bgcolor="rgba(0,0,0,0)", font={"color": "#808890"})
        figure.update_layout(xaxis={"title": "step", **grid}, yaxis={"title": y, **grid}, showlegend=len(lines) > 1)
        self._plots += 1
        return str(
            plotly.io.to_html(
                figure,
                full_html=False,
                include_plotlyjs=self._plots == 1,
                div_id=f"plot-{self._plots}",
                config={"displayModeBar": False, "responsive": True},
            )
        )

    def html(self) -> str:
        """The page as one file."""
        head = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head><body>"
        )
        return head + "\n".join(self._parts) + "</body></html>\n"


def escape(text: object) -> str:
    """Text that can stand anywhere in the page."""
    return html.escape(str(text), quote=True)


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph of less weight."""
    return f'<p class="soft">{escape(text)}</p>'


def number(value: Any) -> str:
    """A number for people: 12,345 or 0.873; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; numbers stand to the right."""
    body, numeric = [], [False] * len(header)
    for row in rows:
        numeric = [isinstance(value, int | float) for value in row]
        body.append("<tr>" + "".join(_cell("td", number(v), n) for v, n in zip(row, numeric, strict=True)) + "</tr>")
    top = "".join(_cell("th", name, right) for name, right in zip(header, numeric, strict=True))
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(tag: str, text: str, right: bool) -> str:
    return f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>"


def bars(rows: Sequence[tuple[str, int, str]]) -> str:
    """Named amounts as bars, each with a remark: the funnel."""
    most = max((amount for _, amount, _ in rows), default=0) or 1
    body = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{amount:,}</td>'
        f'<td class="drawn"><div class="bar" style="width:{100 * amount / most:.1f}%"></div></td>'
        f'<td class="soft">{escape(remark)}</td></tr>'
        for name, amount, remark in rows
    )
    return f'<div class="wide"><table style="width:100%"><tbody>{body}</tbody></table></div>'


def image(data: bytes, alt: str) -> str:
    """A JPEG or PNG inside the page."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def cards(items: Iterable[tuple[bytes, Mapping[str, str]]]) -> str:
    """Pictures, each with named texts beneath it."""
    made = []
    for data, texts in items:
        lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts.items())
        made.append(
            f"<figure>{image(data, next(iter(texts.values()), ''))}<figcaption><dl>{lines}</dl></figcaption></figure>"
        )
    return f'<div class="cards">{"".join(made)}</div>'


def plain(value: Any) -> str:
    """Plain data as text, for facts of any shape."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
