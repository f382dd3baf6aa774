"""Curves and heat maps as inline SVG for the report.

SVG rather than matplotlib's pictures (`plots`): it follows the reader's light or dark theme, stays sharp, fits a phone,
and a page of fifteen takes kilobytes. Colours are the page's CSS variables.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deepseek_jax.metrics.page import text as page_text

COLOURS = 6  # --c0 … --c5 in the page's style
_WIDTH, _HEIGHT = 360, 210  # about a phone's width, so that text keeps its size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 34
_MOST_POINTS = 300
_SHADES = 64


@dataclass
class Series:
    """A curve; `low` and `high` are the edges of a band around it."""

    label: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    """Mark each point: little is known between them."""
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def chart(
    title: str, series: Sequence[Series], x_label: str, note: str = "", marks: Sequence[float] = (),
    *, zero: bool = False, cut_start: bool = False,
) -> str:  # fmt: skip
    """A card with a curve or more.

    Args:
        title, x_label, note: plain text; `note` stands below.
        series: at most `COLOURS`; values that are not finite leave gaps.
        marks: places on the x axis for dotted lines.
        zero: the y axis begins at 0, so that noise does not fill the picture.
        cut_start: of long curves, leave out the high values of the first twentieth, which would flatten all the rest.
    Returns: HTML, or "" where no value is finite.
    """
    series = [s for s in series if (np.isfinite(s.y) & np.isfinite(s.x)).any()][:COLOURS]
    if not series:
        return ""
    notes = [note] if note else []
    if missing := sum(int((~np.isfinite(s.y)).sum()) for s in series):
        notes.append("1 value is not finite." if missing == 1 else f"{missing} values are not finite.")
    if cut_start and max(len(s.x) for s in series) > 200 and (top := _later_top(series)) < 0.7 * _finite(series).max():
        series = [replace(s, y=np.where(s.y > top, np.nan, s.y)) for s in series]
        notes.append(f"Values over {short(top)} at the start are left out.")
    every = _finite(series)
    log = bool(every.min() > 0 and every.max() > 50 * np.median(every))  # a spike would flatten all the rest
    if log:
        notes.append("Logarithmic scale.")
    elif zero:
        every = np.append(every, 0.0)
    x_all = np.concatenate([s.x[np.isfinite(s.x)] for s in series])
    axes = _Axes(_span(x_all, False), _span(every, log), log)
    parts = [axes.frame(x_label)]
    for mark in marks:
        if axes.x_span[0] <= mark <= axes.x_span[1]:
            x = f"{axes.x(mark):.1f}"
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    legend = []
    for i, s in enumerate(series):
        parts.append(axes.band(s, i) + axes.curve(s, i) + (axes.dots(s, i) if s.dots else ""))
        last = short(s.y[np.isfinite(s.y)][-1])
        legend.append(f'<span><i style="background:var(--c{i})"></i>{page_text(s.label)} <b>{last}</b></span>')
    body = f'<p class="legend">{"".join(legend)}</p>' + _svg("".join(parts), title)
    return _card(title, body, " ".join(notes))


def heat_map(
    title: str, values: np.ndarray, *, x_label: str, y_label: str, x_span: tuple[float, float],
    y_ticks: Sequence[tuple[float, str]], limits: tuple[float, float], diverging: bool, ends: tuple[str, str, str],
    note: str = "",
) -> str:  # fmt: skip
    """A card with a heat map.

    Args:
        values: [rows, columns]; the first row is drawn at the top. What is not finite is left blank.
        x_span: what the left and right edges stand for.
        y_ticks: (row, text).
        limits: the values with the first and the last colour.
        diverging: a neutral colour in the middle, rather than from pale to strong.
        ends: what the colour bar says at its left, middle and right.
    """
    rows = len(values)
    axes = _Axes(x_span, (0.0, float(rows)), False)
    left, top, width, height = axes.box
    shades = np.clip((values - limits[0]) / max(limits[1] - limits[0], 1e-30), 0, 1)
    index = np.where(np.isfinite(shades), 1 + np.round(shades * (_SHADES - 1)), 0).astype(np.uint8)
    parts = []
    for theme in ("light", "dark"):
        data = base64.b64encode(_png(index, _palette(diverging, theme))).decode()
        parts.append(
            f'<image class="{theme}" x="{left}" y="{top}" width="{width}" height="{height}" '
            f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        )
    parts.append(axes.x_axis(x_label))
    for row, text in y_ticks:
        y = top + (row + 0.5) * height / rows
        parts.append(f'<text x="{left - 5}" y="{y + 3.5:.1f}" text-anchor="end">{page_text(text)}</text>')
    parts.append(_side_label(y_label))
    bar = "".join(f"<span>{page_text(end)}</span>" for end in ends)
    kind = "diverging" if diverging else "growing"
    return _card(title, _svg("".join(parts), title) + f'<p class="bar {kind}">{bar}</p>', note)


def short(value: float) -> str:
    """A number in few letters: 12.3K, 4.5M, 0.00123."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 0 < size < 0.001:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size >= unit * 0.99995:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


class _Axes:
    """Where numbers lie in a picture."""

    def __init__(self, x_span: tuple[float, float], y_span: tuple[float, float], log: bool):
        self.x_span, self.log = x_span, log
        self.y_span = (math.log10(y_span[0]), math.log10(y_span[1])) if log else y_span
        self.box = _LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_span[0]) / (self.x_span[1] - self.x_span[0]) * self.box[2]

    def y(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return _HEIGHT - _BOTTOM - (place - self.y_span[0]) / (self.y_span[1] - self.y_span[0]) * self.box[3]

    def frame(self, x_label: str) -> str:
        if self.log:
            first, last = math.floor(self.y_span[0]), math.ceil(self.y_span[1])
            every = max(1, (last - first) // 5)
            ticks = [10.0**e for e in range(first, last + 1, every) if self.y_span[0] <= e <= self.y_span[1]]
        else:
            ticks = _ticks(*self.y_span, 5)
        parts = []
        for tick in ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
        return "".join(parts) + self.x_axis(x_label)

    def x_axis(self, label: str) -> str:
        bottom = _HEIGHT - _BOTTOM
        parts = [f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>']
        for tick in _ticks(*self.x_span, 5):
            x = min(max(self.x(tick), _LEFT + 4), _WIDTH - _RIGHT - 8)
            parts.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{short(tick)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        return "".join(parts) + f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{page_text(label)}</text>'

    def curve(self, s: Series, colour: int) -> str:
        x, y = _thinned(s.x, s.y)
        finite = np.isfinite(x) & np.isfinite(y) & ((y > 0) if self.log else True)
        x, y = x.tolist(), y.tolist()
        words, drawn, alone = [], False, []
        for i in range(len(x)):
            if finite[i]:
                words.append(f"{'L' if drawn else 'M'}{self.x(x[i]):.1f} {self.y(y[i]):.1f}")
                if not drawn and not finite[i + 1 : i + 2].any():
                    alone.append(i)  # a point between gaps is no line
            drawn = bool(finite[i])
        kind = "curve faint" if s.dots else "curve"
        path = f'<path class="{kind}" style="stroke:var(--c{colour})" d="{"".join(words)}"/>'
        return path + "".join(self._dot(x[i], y[i], colour) for i in alone)

    def dots(self, s: Series, colour: int) -> str:
        every = max(1, len(s.x) // _MOST_POINTS)
        shown = list(zip(s.x.tolist(), s.y.tolist(), strict=True))[::-every]  # the last one is always among them
        return "".join(self._dot(x, y, colour) for x, y in shown if math.isfinite(x) and math.isfinite(y))

    def band(self, s: Series, colour: int) -> str:
        if s.low is None or s.high is None:
            return ""
        finite = np.isfinite(s.low) & np.isfinite(s.high) & np.isfinite(s.x)
        count = int(finite.sum())
        keep = np.flatnonzero(finite)[np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int)]
        x, low, high = s.x[keep].tolist(), s.low[keep].tolist(), s.high[keep].tolist()
        if not x or (self.log and min(low) <= 0):
            return ""
        there = [f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in zip(x, high, strict=True)]
        back = [f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in zip(x[::-1], low[::-1], strict=True)]
        return f'<path class="band" style="fill:var(--c{colour})" d="M{"L".join(there + back)}Z"/>'

    def _dot(self, x: float, y: float, colour: int) -> str:
        where = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}"'
        return f'<circle {where} r="3" style="fill:var(--c{colour})"><title>{short(x)}: {short(y)}</title></circle>'


def _card(title: str, body: str, note: str) -> str:
    below = f'<p class="note">{page_text(note)}</p>' if note else ""
    return f'<figure class="card"><figcaption>{page_text(title)}</figcaption>{body}{below}</figure>'


def _svg(body: str, title: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{page_text(title)}">{body}</svg>'


def _side_label(text: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{page_text(text)}</text>'


def _finite(series: Sequence[Series]) -> np.ndarray:
    """All finite values, bands included."""
    parts = [part for s in series for part in (s.y, s.low, s.high) if part is not None]
    return np.concatenate([part[np.isfinite(part)] for part in parts])


def _later_top(series: Sequence[Series]) -> float:
    """The highest value after the first twentieth of the x axis, or infinity."""
    x = np.concatenate([s.x for s in series])
    y = np.concatenate([s.y for s in series])
    first, last = np.nanmin(x), np.nanmax(x)
    later = y[np.isfinite(y) & (x >= first + (last - first) / 20)]
    return float(later.max()) if len(later) else math.inf


def _span(values: np.ndarray, log: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.1, high * 1.1
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(high) * 0.05 or 0.5
        return low - pad, high + pad
    return low, high


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from low to high, about `count`."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - count))
    first = math.ceil(low / step - 1e-6)
    return [0.0 if i == 0 else i * step for i in range(first, math.floor(high / step + 1e-6) + 1)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Few enough points to draw: of each stretch the lowest and the highest, so that spikes stay."""
    if len(x) <= 2 * _MOST_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(x)), _MOST_POINTS):
        finite = stretch[np.isfinite(y[stretch])]
        if len(finite):
            kept += sorted({int(finite[y[finite].argmin()]), int(finite[y[finite].argmax()])})
        else:
            kept.append(int(stretch[0]))
    kept = sorted({*kept, len(x) - 1})
    return x[kept], y[kept]


def _palette(diverging: bool, theme: str) -> np.ndarray:
    """uint8 [1 + shades, 3]; the first is that of what is missing, and is drawn transparent."""
    stops = {
        (True, "light"): ("#2166ac", "#8fbce0", "#f3f3f1", "#f0a58c", "#b2182b"),
        (True, "dark"): ("#6ab0f3", "#30557a", "#23272d", "#84413a", "#ff8a70"),
        (False, "light"): ("#f1f5fa", "#86b3dd", "#1f5fa8", "#0a2c57"),
        (False, "dark"): ("#1d232b", "#28507c", "#5a9be0", "#d3e8ff"),
    }[diverging, theme]
    colours = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], dtype=np.float64)
    at = np.linspace(0, len(stops) - 1, _SHADES)
    shades = np.stack([np.interp(at, range(len(stops)), colours[:, c]) for c in range(3)], axis=1)
    return np.concatenate([np.zeros((1, 3)), shades]).round().astype(np.uint8)


def _png(index: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG of palette indices; index 0 is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = index.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), index], axis=1).tobytes()  # filter 0 a row
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = [(b"IHDR", header), (b"PLTE", palette.tobytes()), (b"tRNS", b"\0"), (b"IDAT", zlib.compress(rows, 9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])
