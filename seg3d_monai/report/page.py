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
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #fff; margin: 0 auto; max-width: 1180px;
  padding: 0 24px 64px; }
h1 { font-size: 26px; margin: 28px 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; border-top: 1px solid #d8dde4;
  padding-top: 18px; } h3 { font-size: 15px; margin: 18px 0 6px; }
p.lead { color: #556; margin: 0 0 12px; } p.note { color: #556; font-size: 13px; }
nav a { margin-right: 14px; } a { color: #1f5fa8; }
.numbers { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.number { border: 1px solid #d8dde4; border-radius: 6px; padding: 8px 14px; min-width: 96px; }
.number b { display: block; font-size: 21px; } .number span { color: #556; font-size: 12px; }
.row { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; } .row svg { max-width: 100%; height: auto; }
figure { margin: 0; } figcaption { color: #556; font-size: 12px; max-width: 320px; }
img { max-width: 100%; background: #000; } .tile img { width: 230px; } .tile { width: 230px; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; } td, th { padding: 3px 12px 3px 0; text-align: left;
  border-bottom: 1px solid #e6e9ee; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
details { margin: 8px 0; } pre { background: #f5f7fa; padding: 12px; overflow-x: auto; font-size: 12px; }
@media print { details { display: none; } }
"""


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

    def row(self, pictures: Sequence[tuple[str, str]]) -> None:
        """Add pictures side by side: SVG or `<img>` elements, each with a line below it."""
        figures = "".join(
            f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>" for picture, caption in pictures
        )
        self._add(f'<div class="row">{figures}</div>')

    def tiles(self, title: str, pictures: Sequence[tuple[str, str]]) -> None:
        """Add small pictures under a heading."""
        figures = "".join(
            f'<figure class="tile">{picture}<figcaption>{escape(caption)}</figcaption></figure>'
            for picture, caption in pictures
        )
        self._add(f'<h3>{escape(title)}</h3><div class="row">{figures}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table; numbers stand to the right."""
        top = "".join(f"<th>{escape(name)}</th>" for name in head)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self._add(f"<table><tr>{top}</tr>{body}</table>")

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
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">"
            f"<title>{escape(self._title)}</title><style>{STYLE}</style></head><body>"
            f'<h1>{escape(self._title)}</h1><p class="lead">{escape(self._lead)}</p><nav>{links}</nav>{body}'
            "</body></html>\n"
        )

    def _add(self, element: str) -> None:
        self._sections[-1][1].append(element)


def picture(figure: Figure, dpi: int = 110, description: str = "") -> str:
    """A figure as an `<img>` that holds its own PNG."""
    FigureCanvasAgg(figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None}, facecolor=figure.get_facecolor())
    encoded = base64.b64encode(data.getvalue()).decode("ascii")
    return f'<img alt="{escape(description, quote=True)}" src="data:image/png;base64,{encoded}">'


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    start = '<td class="n">' if is_number else "<td>"
    return f"{start}{escape(shown(value))}</td>"
