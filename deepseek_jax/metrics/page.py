"""Pieces of HTML for the report: the page around it, tables, trees. All text that comes in is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Nothing may be fetched and nothing run, whatever a model wrote into a sample: only this page's own style and pictures.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1c1e21; --soft: #62676e; --line: #e2e3e0;
  --c0: #1f5fa8; --c1: #c2410c; --c2: #2f7d4f; --c3: #8a3ea8; --c4: #a16207; --c5: #b8235a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1b1f25; --text: #e6e8ea; --soft: #9aa2ab;
  --line: #2d333b; --c0: #6ab0f3; --c1: #ff9a62; --c2: #6cc493; --c3: #cf93ea; --c4: #e0b341; --c5: #f583a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 20px 16px 60px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 10px; }
p { margin: 4px 0; } .soft, .note { color: var(--soft); } .note { font-size: 12px; }
.warn { border-left: 3px solid var(--c1); padding: 4px 10px; background: var(--card); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 16px 0; }
.tile, .card, .box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 9px 12px; } .tile b { display: block; font-size: 19px; font-weight: 600; overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
.card { margin: 0; padding: 10px 10px 8px; min-width: 0; } figcaption { font-weight: 600; font-size: 14px; }
.legend { font-size: 12px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 12px; margin: 2px 0 4px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.legend b { color: var(--text); font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 10.5px; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); stroke-opacity: .6; }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; } .curve { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
.faint { stroke-opacity: .45; stroke-width: 1; }
.band { fill-opacity: .18; } image { image-rendering: pixelated; } image.dark { display: none; }
.bar { display: flex; justify-content: space-between; font-size: 12px; margin: 4px 8px 0 44px; padding-top: 12px;
  color: var(--soft); background-repeat: no-repeat; background-size: 100% 8px; }
.diverging { background-image: linear-gradient(90deg, #2166ac, #8fbce0, #f3f3f1, #f0a58c, #b2182b); }
.growing { background-image: linear-gradient(90deg, #f1f5fa, #86b3dd, #1f5fa8, #0a2c57); }
@media (prefers-color-scheme: dark) { image.dark { display: inline; } image.light { display: none; }
  .diverging { background-image: linear-gradient(90deg, #6ab0f3, #30557a, #23272d, #84413a, #ff8a70); }
  .growing { background-image: linear-gradient(90deg, #1d232b, #28507c, #5a9be0, #d3e8ff); } }
.box { padding: 8px 12px; margin: 8px 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; } td, th { padding: 3px 16px 3px 0; text-align: left;
  vertical-align: top; } th { color: var(--soft); font-weight: 500; } td { overflow-wrap: anywhere; min-width: 6em; }
td.number { min-width: 4em; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
details { margin-left: 2px; } details details { margin-left: 14px; } summary { cursor: pointer; }
.leaf { margin-left: 30px; overflow-wrap: anywhere; } .tree { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
.tree .name { color: var(--soft); } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; } pre b { color: var(--c0); }
"""
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def page(title: str, body: str) -> str:
    """The whole file."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{text(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def text(value: Any) -> str:
    """Any value as text that is only text; characters that a page cannot hold become �."""
    return html.escape(_UNSEEN.sub("\ufffd", str(value)))


def section(title: str, body: str) -> str:
    """A heading and what follows; "" where nothing does."""
    return f"<h2>{text(title)}</h2>{body}\n" if body else ""


def tiles(figures: Sequence[tuple[str, str | None]]) -> str:
    """(label, figure) as tiles; those without a figure are left out."""
    shown = [
        f'<div class="tile"><span>{text(label)}</span><b>{text(value)}</b></div>' for label, value in figures if value
    ]
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def cards(charts: Sequence[str]) -> str:
    """Charts side by side where there is room."""
    shown = [chart for chart in charts if chart]
    return f'<div class="cards">{"".join(shown)}</div>' if shown else ""


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """(name, value) as a table; rows without a value are left out."""
    shown = [f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows if value not in (None, "")]
    return f'<div class="box"><table>{"".join(shown)}</table></div>' if shown else ""


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; numbers, given as such, stand to the right."""
    if not rows:
        return ""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="number">{value:.4f}</td>'
        return f"<td>{text('' if value is None else value)}</td>"

    head = "".join(f"<th>{text(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="box"><table><tr>{head}</tr>{body}</table></div>'


def tree(name: str, value: Any, *, unfolded: int = 0) -> str:
    """Nested dicts and lists to unfold; the outermost `unfolded` floors stand open."""
    return f'<div class="box tree">{_branch(name, value, unfolded)}</div>'


def _branch(name: str, value: Any, unfolded: int) -> str:
    label = f'<span class="name">{text(name)}</span>'
    if isinstance(value, Mapping) and value:
        kind = f" {text(value['type'])}" if isinstance(value.get("type"), str) else ""
        items = [(str(key), item) for key, item in value.items() if not (kind and key == "type")]
        label += kind
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return f'<div class="leaf">{label} {text(value)}</div>'
    inner = "".join(_branch(key, item, unfolded - 1) for key, item in items)
    return f"<details{' open' if unfolded > 0 else ''}><summary>{label}</summary>{inner}</details>"
