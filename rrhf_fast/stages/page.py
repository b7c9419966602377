"""Pages for people: one HTML file that holds its pictures and loads nothing. It fits phones and
desks, light and dark; what is wider than the screen scrolls by itself."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from rrhf_fast.stages.files import write_text
from rrhf_fast.stages.terminal import Table

_STYLE = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --line: #ddd; --soft: #595959;
  --note: #fff4d6; --edge: #b58900 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --page: #16181c; --line: #3a3f47;
  --soft: #a3a9b3; --note: #3a2f10; --edge: #d9a520 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem;
  padding: 1rem clamp(.8rem, 3vw, 2rem) 3rem; color: var(--text); background: var(--page) }
h1 { font-size: 1.6rem; line-height: 1.2 }
h2 { font-size: 1.2rem; margin: 2rem 0 .6rem }
p, dl { margin: .6rem 0; overflow-wrap: anywhere }
.lead, dt { color: var(--soft) }
.warning { background: var(--note); border-left: 4px solid var(--edge); padding: .5rem .8rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dd { margin: 0 }
.scroll { overflow-x: auto; max-width: 100%; margin: 1rem 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem;
  border-bottom: 1px solid var(--line) }
thead th { border-bottom: 2px solid var(--line) }
th[scope=row] { font-weight: normal; min-width: 8rem; position: sticky; left: 0;
  background: var(--page) }
.figures td { white-space: nowrap }
.texts td { min-width: 12rem; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext }
img { display: block; width: 100%; min-width: 44rem; height: auto; background: #fff }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--line); font-size: .9rem }
@media (max-width: 40rem) { dl { display: block } dd { margin-bottom: .4rem } }
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of parts that the functions below make."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>",
        f"<body><main><h1>{escape(title)}</h1>",
        *parts,
        "</main></body></html>",
    ]
    write_text(path, "\n".join(lines) + "\n")


def heading(text: str) -> str:
    """The heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; its kind may be lead or warning."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def picture(file: Path, alt: str) -> str:
    """A PNG, kept in the page; `alt` says what it shows."""
    data = base64.b64encode(file.read_bytes()).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return _scrolling("picture", image)


def figures(table: Table, label: str) -> str:
    """A table of numbers, each row of which has a name."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table[1]
    )
    return _scrolling(label, f'<table class="figures">{_head(table)}<tbody>{rows}</tbody></table>')


def texts(table: Table, label: str) -> str:
    """A table of texts, whose lines are kept."""
    rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table[1])
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return _scrolling(label, f'<table class="texts">{_head(table)}<tbody>{body}</tbody></table>')


def facts(pairs: Mapping[str, str]) -> str:
    """Names and what they stand for."""
    items = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def code(text: str) -> str:
    """A text as it is."""
    return f"<pre>{escape(text)}</pre>"


def _head(table: Table) -> str:
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
    return f"<thead><tr>{cells}</tr></thead>"


def _scrolling(label: str, content: str) -> str:
    """What may be wider than the page, to be scrolled by touch, mouse or keys."""
    attributes = f'class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"'
    return f"<div {attributes}>{content}</div>"
