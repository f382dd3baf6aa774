"""Pictures of a run from its metric lines: drawn without pyplot, so nothing global is touched and no display is needed.

Names read from the lines (each may be missing, now and then or always):

    step, tokens                               where the line stands
    loss                                       the whole training loss, nats per token
    loss_main, loss_mtp, loss_balance          its parts: next token, multi-token prediction, expert balance
    held_out_loss, held_out_bits_per_byte      an evaluation
    router                                     {"moe_layers": {...}, "mtp": {...}}, each with
        load                                   [layers, experts]: tokens (or a share of them) each expert got
        max_violation                          [layers]: largest load over mean load, less 1
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from deepseek_jax import storage
from deepseek_jax.metrics.writer import read_jsonl

Lines = str | os.PathLike[str] | Iterable[Mapping[str, Any]]

_LOSSES = (  # name in a line, label, colour
    ("loss", "train, all parts", "#9aa5b1"),
    ("loss_main", "train, next token", "#1f5fa8"),
    ("loss_mtp", "train, multi-token prediction", "#d98217"),
)
_HELD_OUT = "#b3261e"
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}


def loss_curve(metrics: Lines, path: str | os.PathLike[str]) -> epath.Path:
    """Draws the training loss, its parts and the held-out evaluations over the steps.

    Args:
        metrics: a metrics.jsonl, or its lines as dicts.
        path: where the picture goes; the suffix says its kind (.png, .svg, .pdf).
    Returns: the path.
    Raises: ValueError when no line has a loss.
    """
    records = _records(metrics)
    series = [(label, colour, *_series(records, name)) for name, label, colour in _LOSSES]
    if not any(len(steps) for _, _, steps, _ in series):
        raise ValueError(f"metrics: none of {len(records)} lines has a loss to draw")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        balance_steps, balance = _series(records, "loss_balance")
        heights = [4.0, 1.3] if np.any(balance != 0) else [4.0]
        figure, axes = _figure(8, sum(heights) + 0.5, heights)
        top = axes[0]
        for label, colour, steps, values in series:
            if len(steps):
                marker = "." if len(steps) == 1 else None
                top.plot(steps, values, color=colour, linewidth=1.2, marker=marker, label=label)
        _held_out(top, records)
        top.set_ylabel("loss (nats per token)")
        top.legend(frameon=False)
        if len(axes) > 1:
            axes[1].plot(balance_steps, balance, color="#4b7f52", linewidth=1.2)
            axes[1].set_ylabel("balance loss")
            axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        top.set_title(_title(records), loc="left", fontsize=10)
        return _save(figure, path)


def router_heatmap(
    metrics_or_loads: Lines | np.ndarray, path: str | os.PathLike[str], *, first_layer: int = 0
) -> epath.Path:
    """Draws how evenly the experts are used: the last load of each layer's experts, and MaxVio over the steps.

    Args:
        metrics_or_loads: a metrics.jsonl, its lines, or one load array [layers, experts] (no MaxVio panel then).
        path: where the picture goes.
        first_layer: number of the first layer that has experts, for the labels.
    Returns: the path.
    Raises: ValueError when no line has a router's load, or it is no [layers, experts].
    """
    if isinstance(metrics_or_loads, np.ndarray):
        title, groups, violations = "expert load", {"moe_layers": metrics_or_loads}, []
    else:
        records = _records(metrics_or_loads)
        loads = _router(records, "load")
        if not loads:
            raise ValueError(f"metrics: none of {len(records)} lines has a router's load to draw")
        step, groups = loads[-1]
        title = f"expert load at step {step:,}"
        violations = [(step, np.concatenate(list(rows.values()))) for step, rows in _router(records, "max_violation")]
    load = np.concatenate(list(groups.values()))
    if load.ndim != 2 or load.size == 0:
        raise ValueError(f"the router's load has shape {list(load.shape)}: give [layers, experts]")
    labels = _layer_labels(groups, first_layer)
    relative = load * load.shape[1] / np.maximum(load.sum(axis=1, keepdims=True), 1e-30)
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        height = min(2.4 + 0.22 * len(load), 7.0)
        heights = [height - 1.0, 2.0] if violations else [height - 1.0]
        figure, axes = _figure(8, sum(heights) + 1.0, heights)
        _draw_load(figure, axes[0], relative, labels)
        axes[0].set_title(title, loc="left", fontsize=10)
        if violations:
            _draw_violations(axes[1], violations, labels)
        return _save(figure, path)


def _draw_load(figure: Any, axes: Any, relative_LE: np.ndarray, labels: Sequence[str]) -> None:
    image = axes.imshow(relative_LE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    every = max(1, len(labels) // 20)
    axes.set_yticks(range(0, len(labels), every), labels[::every])
    axes.xaxis.get_major_locator().set_params(integer=True)
    over = "max" if relative_LE.max() > 2 else "neither"
    ticks = [0, 0.5, 1, 1.5, 2]
    figure.colorbar(image, ax=axes, extend=over, ticks=ticks, label="load / even share", pad=0.015, aspect=30)


def _draw_violations(axes: Any, violations: Sequence[tuple[int, np.ndarray]], labels: Sequence[str]) -> None:
    import matplotlib

    steps = [step for step, _ in violations]
    values = np.stack([value for _, value in violations])
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, values.shape[1]))
    named = values.shape[1] <= 8 and len(labels) == values.shape[1]
    names = [f"layer {label}" if label.isdecimal() else label for label in labels]
    for layer in range(values.shape[1]):
        label = names[layer] if named else None
        axes.plot(steps, values[:, layer], color=colours[layer], linewidth=0.9, alpha=0.8, label=label)
    if values.shape[1] > 1:
        axes.plot(steps, values.mean(axis=1), color="black", linewidth=1.6, label="mean")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("MaxVio\n(max / mean load − 1)")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _held_out(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Held-out evaluations as points: nothing is known between them."""
    steps, values = _series(records, "held_out_loss")
    if not len(steps):
        return
    axes.plot(steps, values, "o", color=_HELD_OUT, markersize=4, label="held out, next token", zorder=3)


def _title(records: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"step {records[-1]['step']:,}"]
    tokens = [record["tokens"] for record in records if record.get("tokens")]
    if tokens:
        parts.append(f"{_amount(tokens[-1])} tokens")
    _, bits = _series(records, "held_out_bits_per_byte")
    if len(bits) > 1:
        parts.append(f"held out {bits[0]:.3f} → {bits[-1]:.3f} bits per byte")
    elif len(bits):
        parts.append(f"held out {bits[0]:.3f} bits per byte")
    return ", ".join(parts)


def _amount(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _records(metrics: Lines) -> Sequence[Mapping[str, Any]]:
    records = read_jsonl(metrics) if isinstance(metrics, str | os.PathLike) else list(metrics)
    if not records:
        raise ValueError("metrics: there are no lines to draw")
    return records


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a value of that name."""
    points = [(record["step"], np.mean(record[name])) for record in records if record.get(name) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _router(records: Sequence[Mapping[str, Any]], field: str) -> list[tuple[int, dict[str, np.ndarray]]]:
    """(step, group of layers -> values [layers, ...]) of the lines that have that field."""
    found = []
    for record in records:
        groups = {name: stats[field] for name, stats in (record.get("router") or {}).items() if field in stats}
        if groups:
            arrays = {name: np.asarray(value, dtype=np.float64) for name, value in groups.items()}
            found.append((record["step"], arrays))
    return found


def _layer_labels(groups: Mapping[str, np.ndarray], first_layer: int) -> list[str]:
    """The decoder's layers by their number, other groups by name and number from 1."""
    labels: list[str] = []
    for name, load in groups.items():
        decoder = name == "moe_layers"
        labels += [str(first_layer + i) if decoder else f"{name} {i + 1}" for i in range(len(load))]
    return labels


def _figure(width: float, height: float, heights: Sequence[float]) -> tuple[Any, Sequence[Any]]:
    """A figure of its own, sizes in inches, and its axes from top to bottom with heights in these ratios."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    return figure, list(axes)


def _save(figure: Any, path: str | os.PathLike[str]) -> epath.Path:
    path = storage.path(path)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=path.suffix.removeprefix(".") or "png")
    return storage.write_atomic(path, picture.getvalue())
