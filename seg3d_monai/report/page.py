"""A page of a report: one HTML file that needs nothing else, no script and no network.

It must not know what is shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #556070; --line: #d8dde4; --paper: #fff; --box: #f5f7fa;
  --link: #1f5fa8; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1180px; padding: 0 24px 64px; overflow-wrap: break-word; }
h1 { font-size: 26px; margin: 28px 0 4px; }
h2 { font-size: 19px; margin: 36px 0 8px; border-top: 1px solid var(--line); padding-top: 18px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p.lead { color: var(--soft); margin: 0 0 12px; } p.note { color: var(--soft); font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 14px; } a { color: var(--link); }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.number { border: 1px solid var(--line); border-radius: 6px; padding: 8px 14px; min-width: 96px; }
.number b { display: block; font-size: 21px; } .number span { color: var(--soft); font-size: 12px; }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; margin: 8px 0; }
figure { margin: 0; } .row > figure { flex: 1 1 300px; max-width: 403px; min-width: 0; }
.row > figure.wide { flex-basis: 420px; max-width: 620px; }
.row > figure.tile { flex: 0 1 230px; width: 230px; }
figcaption { color: var(--soft); font-size: 12px; margin-top: 4px; }
img { display: block; max-width: 100%; height: auto; background: #000; } .tile img { width: 230px; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
td, th { padding: 3px 14px 3px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 22px; height: 10px; margin: 0 6px 0 0; border: 2px solid; background: #000; }
.key { font-size: 13px; margin-right: 18px; }
details { margin: 8px 0; } summary { cursor: pointer; }
pre { background: var(--box); padding: 12px; overflow-x: auto; font-size: 12px; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #dbe1e8; --soft: #9aa6b4; --line: #343c47; --paper: #14181d; --box: #1d232b; --link: #7db5f0; }
  svg { filter: invert(0.9) hue-rotate(180deg); }
}
@media (max-width: 600px) { body { padding: 0 12px 48px; } }
@media print { details { display: none; } }
"""


_TO_THE_RIGHT = ' class="n"'


class Page:
    """Gathers sections, then gives the text of the file.

    Args:
        title: of the page.
        lead: what it is about, one line.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title, self._lead = title, lead
        self._sections: list[tuple[str, list[str]]] = []

    def section(self, title: str, explanation: str = "") -> None:
        """Begin a section; everything added next belongs to it."""
        self._sections.append((title, [f"<p>{escape(explanation)}</p>"] if explanation else []))

    def numbers(self, values: Mapping[str, Any]) -> None:
        """Add large numbers with their names."""
        cells = "".join(
            f'<div class="number"><b>{escape(shown(value))}</b><span>{escape(name)}</span></div>'
            for name, value in values.items()
        )
        self._add(f'<div class="numbers">{cells}</div>')

    def row(self, pictures: Sequence[tuple[str, str]], kind: str = "") -> None:
        """Add pictures side by side: SVG or `<img>` elements, each with a line below it.

        Args:
            pictures: each with its line.
            kind: "" for charts, "wide" for large pictures, "tile" for small ones.
        """
        start = f'<figure class="{kind}">' if kind else "<figure>"
        figures = "".join(
            f"{start}{picture}<figcaption>{escape(caption)}</figcaption></figure>" for picture, caption in pictures
        )
        self._add(f'<div class="row">{figures}</div>')

    def tiles(self, title: str, pictures: Sequence[tuple[str, str]]) -> None:
        """Add small pictures under a heading."""
        self._add(f"<h3>{escape(title)}</h3>")
        self.row(pictures, "tile")

    def key(self, colours: Mapping[str, str]) -> None:
        """Say which colour stands for what.

        Args:
            colours: CSS colours by what they stand for.
        """
        keys = "".join(
            f'<span class="key"><span class="swatch" style="border-color: {colour}"></span>{escape(name)}</span>'
            for name, colour in colours.items()
        )
        self._add(f"<p>{keys}</p>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table; numbers stand to the right, and so does what is above them."""
        is_numbers = [any(_is_number(row[n]) for row in rows) for n in range(len(head))]
        top = "".join(
            f"<th{_TO_THE_RIGHT if is_number else ''}>{escape(name)}</th>"
            for name, is_number in zip(head, is_numbers, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(_cell(value, is_number) for value, is_number in zip(row, is_numbers, strict=True))
            + "</tr>"
            for row in rows
        )
        self._add(f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>')

    def note(self, text: str) -> None:
        """Add a small line."""
        self._add(f'<p class="note">{escape(text)}</p>')

    def hidden(self, title: str, text: str) -> None:
        """Add text that is shown when its title is clicked at."""
        self._add(f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>")

    def text(self) -> str:
        """The whole file."""
        links = "".join(f'<a href="#s{n}">{escape(title)}</a>' for n, (title, _) in enumerate(self._sections))
        body = "".join(
            f'<h2 id="s{n}">{escape(title)}</h2>' + "".join(parts) for n, (title, parts) in enumerate(self._sections)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">"
            f"<title>{escape(self._title)}</title><style>{STYLE}</style></head><body>"
            f'<h1>{escape(self._title)}</h1><p class="lead">{escape(self._lead)}</p><nav>{links}</nav>{body}'
            "</body></html>\n"
        )

    def _add(self, element: str) -> None:
        self._sections[-1][1].append(element)


def picture(figure: Figure, dpi: int = 110, description: str = "") -> str:
    """A figure as an `<img>` that holds its own PNG and says its size."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None}, facecolor=figure.get_facecolor())
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    width, height = (int(inch * dpi) for inch in figure.get_size_inches())
    return (
        f'<img width="{width}" height="{height}" alt="{escape(description, quote=True)}" '
        f'src="data:image/png;base64,{encoded}">'
    )


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: Any, is_number: bool) -> str:
    text = "–" if value is None and is_number else shown(value)
    return f"<td{_TO_THE_RIGHT if is_number else ''}>{escape(text)}</td>"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
