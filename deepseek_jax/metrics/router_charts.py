"""The report's part on routers: how evenly experts are used, layer by layer, and over time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deepseek_jax.metrics.charts import Series, chart, heat_map, short
from deepseek_jax.metrics.history import History

_FIGURES = (  # name in a line, title, what it means
    ("max_violation", "MaxVio", "Largest load of an expert over the mean load, less 1; 0 is even."),
    ("entropy", "Routing entropy (nats)", "Of a token's affinities over all experts."),
    ("dropped", "Dropped share", "Of token-expert pairs, for want of capacity."),
    ("bias_spread", "Selection bias spread", "Largest less smallest bias."),
)
_MOST_CURVES = 5
_COLUMNS = 240  # steps side by side in a heat map


def router_cards(history: History, first_layer: int) -> list[str]:
    """Cards of curves and heat maps; [] for a dense model.

    Args:
        history: what metrics.jsonl says.
        first_layer: number of the first layer that has experts.
    """
    cards = [_last_load(history, first_layer)]
    for name, title, note in _FIGURES:
        cards.append(_figure(history, name, title, note, first_layer))
        if name == "max_violation":
            cards.append(_over_layers(history, name, title, first_layer))
    cards += [_load_over_time(history, group, layer, first_layer) for group, layer in history.loads]
    return [card for card in cards if card]


def _layer(group: str, index: int, first_layer: int) -> str:
    return str(first_layer + index) if group == "moe_layers" else f"{group} {index + 1}"


def _stacked(rows: list[tuple[float, list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """(steps [n], values [n, layers]) of the lines with as many layers as the last."""
    count = len(rows[-1][1])
    same = [(step, values) for step, values in rows if len(values) == count]
    return np.array([step for step, _ in same]), np.array([values for _, values in same], dtype=np.float64)


def _figure(history: History, name: str, title: str, note: str, first_layer: int) -> str:
    """Every layer where they are few, else the mean with a band from the lowest to the highest layer."""
    series = []
    for (group, found), rows in history.layers.items():
        if found != name:
            continue
        steps, values = _stacked(rows)
        if name == "dropped" and not np.nansum(values):
            continue  # nothing can be dropped where there is no capacity
        if values.shape[1] <= _MOST_CURVES:
            for layer in range(values.shape[1]):
                label = _layer(group, layer, first_layer)
                series.append(Series(f"layer {label}" if label.isdecimal() else label, steps, values[:, layer]))
        else:
            finite = np.where(np.isfinite(values), values, np.nan)
            there = np.isfinite(finite).any(axis=1)  # numpy warns of rows that hold nothing
            low, mean, high = (np.full(len(steps), np.nan) for _ in range(3))
            low[there], high[there] = np.nanmin(finite[there], axis=1), np.nanmax(finite[there], axis=1)
            mean[there] = np.nanmean(finite[there], axis=1)
            series.append(Series(f"mean of {values.shape[1]} layers", steps, mean, low=low, high=high))
            note += " Band: lowest to highest layer."
    return chart(title, series, "step", note)


def _over_layers(history: History, name: str, title: str, first_layer: int) -> str:
    """Layer by step, for stacks that are too deep for a curve a layer."""
    rows = history.layers.get(("moe_layers", name))
    if not rows or len(rows[-1][1]) <= _MOST_CURVES:
        return ""
    steps, values = _stacked(rows)
    if not np.isfinite(values).any():
        return ""
    keep = np.linspace(0, len(steps) - 1, min(len(steps), _COLUMNS)).round().astype(int)
    image = values[keep].T
    top = float(np.quantile(image[np.isfinite(image)], 0.99)) or 1.0
    return heat_map(
        f"{title} of each layer", image, x_label="step", y_label="layer", x_span=_x_span(steps[keep]),
        y_ticks=_every(len(image), lambda i: _layer("moe_layers", i, first_layer)), limits=(0.0, top),
        diverging=False, ends=("0", short(top / 2), f"{short(top)} and more"),
    )  # fmt: skip


def _last_load(history: History, first_layer: int) -> str:
    """Layer by expert, at the last line."""
    if history.last_load is None:
        return ""
    step, groups = history.last_load
    widest = max((load.shape[1] for load in groups.values()), default=0)
    rows, labels = [], []
    for group, load_LE in groups.items():
        for layer, load in enumerate(_relative(load_LE)):
            rows.append(np.pad(load, (0, widest - len(load)), constant_values=np.nan))
            labels.append(_layer(group, layer, first_layer))
    if not rows:
        return ""
    return heat_map(
        f"Expert load at step {step:,}", np.stack(rows), x_label="expert", y_label="layer", x_span=(0, widest),
        y_ticks=_every(len(rows), lambda i: labels[i]), limits=(0.0, 2.0), diverging=True,
        ends=("no tokens", "even share", "twice and more"),
    )  # fmt: skip


def _load_over_time(history: History, group: str, layer: int, first_layer: int) -> str:
    """Expert by step, of one layer."""
    rows = history.loads[group, layer]
    if len(rows) < 2:
        return ""
    steps = np.array([step for step, _ in rows])
    image = _relative(np.stack([load for _, load in rows])).T
    label = _layer(group, layer, first_layer)
    return heat_map(
        f"Load of the experts of {'layer ' if label.isdecimal() else ''}{label}", image, x_label="step",
        y_label="expert", x_span=_x_span(steps), y_ticks=_every(len(image), str), limits=(0.0, 2.0), diverging=True,
        ends=("no tokens", "even share", "twice and more"),
    )  # fmt: skip


def _relative(load_XE: np.ndarray) -> np.ndarray:
    """Load over even share."""
    load = load_XE.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return load * load.shape[1] / np.maximum(load.sum(axis=1, keepdims=True), 1e-30)


def _x_span(steps: np.ndarray) -> tuple[float, float]:
    first, last = float(steps[0]), float(steps[-1])
    return (first, last) if last > first else (first, first + 1)


def _every(count: int, label: Callable[[int], str]) -> list[tuple[float, str]]:
    """Up to nine rows with their labels."""
    stride = -(-count // 9)
    return [(row, label(row)) for row in range(0, count, stride)]
