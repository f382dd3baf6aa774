"""One HTML page on a run: what it came to, its curves, its routers, how it was started, what the model writes.

The page is made from the run folder's manifest.json, metrics.jsonl and samples.jsonl, at any time and of a run in any
state: what is missing is left out. It holds everything itself, needs no network and runs no script.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax import storage
from deepseek_jax.metrics import page
from deepseek_jax.metrics.charts import COLOURS, Series, chart, short
from deepseek_jax.metrics.history import History, read_history
from deepseek_jax.metrics.router_charts import router_cards

_CURVES = (  # title, names and labels, x axis
    ("Reward", (("reward", "mean"), ("reward_std", "deviation within a group")), "step"),
    ("Length of completions", (("length_mean", "mean"), ("length_ended", "of those that ended")), "step"),
    ("Shares of completions", (("truncated", "cut off"), ("zero_variance", "prompts without differences")), "step"),
    ("Entropy of the policy", (("entropy", "nats"),), "step"),
    ("Divergence from the reference", (("kl", "KL"),), "step"),
    ("Sampler against trainer", (("sampler_drift_max", "largest difference of log p"),), "step"),
    ("Expert balance loss", (("loss_balance", "balance"),), "step"),
    ("Gradient norm", (("grad_norm", "before clipping"),), "step"),
    ("Learning rate", (("learning_rate", "learning rate"),), "tokens"),
    ("Batch size", (("batch_size", "sequences"),), "tokens"),
    ("Multi-token loss weight λ", (("mtp_loss_weight", "λ"),), "tokens"),
    ("Bias update speed γ", (("bias_update_speed", "γ"),), "tokens"),
    ("Tokens per second", (("tokens_per_second", "all devices"),), "step"),
    ("Model FLOPs utilisation", (("mfu", "MFU"),), "step"),
    ("Updates left out", (("skipped", "so far"),), "step"),
)
_LOSSES = (("loss_main", "next token"), ("loss_mtp", "multi-token"), ("loss", "all parts"))
_FROM_ZERO = ("tokens_per_second", "mfu", "batch_size", "learning_rate")
_UNVARIED = ("loss_balance", "batch_size", "mtp_loss_weight", "bias_update_speed", "skipped")  # no curve if constant


def report(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Any:
    """Writes the page.

    Args:
        run_dir: folder of a run.
        path: where the page goes; None is run_dir/report.html.
    Returns: the path.
    Raises: ValueError where `run_dir` holds neither manifest.json nor metrics.jsonl.
    """
    folder = storage.path(run_dir)
    names = ("manifest.json", "metrics.jsonl")
    if not any((folder / name).exists() for name in names):
        raise ValueError(f"{os.fspath(run_dir)}: no run folder: it holds neither {names[0]} nor {names[1]}")
    manifest, complaint = _read_manifest(folder / names[0])
    history = read_history(folder / names[1])
    complaints = [complaint] if complaint else []
    if history.unreadable:
        complaints.append(f"Lines of metrics.jsonl that cannot be read, and are left out: {history.unreadable}.")
    title = f"{_get(manifest, 'config', 'model', 'name') or 'Run'} · {folder.name}"
    body = [
        f"<h1>{page.text(title)}</h1>",
        f'<p class="soft">{page.text(_subtitle(folder, manifest, history))}</p>',
        *(f'<p class="warn">{page.text(words)}</p>' for words in complaints),
        page.tiles(_headline(manifest, history)),
        page.section("Held-out text by source", _held_out_table(history)),
        page.section("Curves", page.cards(_curves(manifest, history))),
        page.section("Routers", page.cards(router_cards(history, _first_moe_layer(manifest)))),
        page.section("Samples", _samples(folder / "samples.jsonl")),
        page.section("Certificate", _tree(manifest, "certificate", unfolded=2)),
        page.section("Starts", _starts(manifest)),
        page.section("Configuration", _tree(manifest, "config", unfolded=1) + _tree(manifest, "data")),
        page.section("Environment", _environment(manifest)),
    ]
    return storage.write_atomic(folder / "report.html" if path is None else path, page.page(title, "\n".join(body)))


def _read_manifest(path: Any) -> tuple[dict[str, Any], str | None]:
    """The manifest, {} where there is none to read, and what is to be said about it."""
    if not path.exists():
        return {}, "There is no manifest.json: how the run was started is not known."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, f"manifest.json cannot be read ({error})."
    return (manifest, None) if isinstance(manifest, dict) else ({}, "manifest.json is not an object.")


def _subtitle(folder: Any, manifest: Mapping[str, Any], history: History) -> str:
    parts = []
    if started := [run.get("started") for run in _runs(manifest) if isinstance(run.get("started"), str)]:
        parts.append(f"first started {started[0]}")
    planned = _get(manifest, "config", "steps")
    if isinstance(planned, int) and planned > history.last_step:
        parts.append(f"stopped or still going: step {history.last_step:,} of {planned:,}")
    return " · ".join([*parts, os.fspath(folder)])


def _headline(manifest: Mapping[str, Any], history: History) -> list[tuple[str, str | None]]:
    def figure(value: float | None, kind: str) -> str | None:
        return None if value is None else format(value, kind)

    _, bits = history.curve("held_out_bits_per_byte")
    bits = bits[np.isfinite(bits)]
    skipped, mfu, speed = history.last("skipped"), history.median("mfu"), history.median("tokens_per_second")
    devices = manifest.get("devices")
    device = _get(devices, "kind") and f"{_get(devices, 'count')} × {_get(devices, 'kind')}"
    held_out = " → ".join(f"{value:.3f}" for value in (bits[[0, -1]] if len(bits) > 1 else bits))
    return [
        ("steps", f"{history.last_step:,}" if history.lines else None),
        ("tokens", short(history.tokens) if history.tokens else None),
        ("last loss, next token", figure(history.last("loss_main"), ".4f")),
        ("last loss, all parts", figure(history.last("loss"), ".4f")),
        ("held-out bits per byte", held_out or None),
        ("tokens/s, median", None if speed is None else short(speed)),
        ("MFU, median", figure(mfu, ".1%")),
        ("time in training steps", _training_time(history)),
        ("updates left out", f"{skipped:,.0f}" if skipped is not None else None),
        ("devices", device),
    ]


def _training_time(history: History) -> str | None:
    """From tokens and speed: without compilation of later starts, evaluations and the time between starts."""
    steps, speed = history.curve("tokens_per_second")
    tokens, _ = history.curve("tokens_per_second", by="tokens")
    if not len(steps) or not np.isfinite(tokens).all():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = np.diff(tokens, prepend=0.0) / speed
    whole = float(seconds[np.isfinite(seconds) & (seconds > 0)].sum())
    if not math.isfinite(whole) or whole <= 0:
        return None
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= 2 * size:
            return f"{whole / size:,.1f} {unit}"
    return f"{whole:.1f} s"


def _held_out_table(history: History) -> str:
    rows = []
    for source in history.sources():
        row: list[Any] = [source]
        for name in ("loss", "bits_per_byte"):
            values = [value for _, value in history.held_out.get((source, name), ())]
            row += [values[0], values[-1]] if values else [None, None]
        rows.append(row)
    return page.table(("source", "loss, first", "last", "bits per byte, first", "last"), rows)


def _curves(manifest: Mapping[str, Any], history: History) -> list[str]:
    marks = [run["from_step"] for run in _runs(manifest) if isinstance(run.get("from_step"), int) and run["from_step"]]
    losses = [Series(label, *history.curve(name)) for name, label in _LOSSES]
    losses.append(Series("held out, next token", *history.curve("held_out_loss"), dots=True))
    charts = [
        chart(
            "Loss (nats per token)",
            losses,
            "step",
            "Dotted: the run was resumed." if marks else "",
            marks,
            cut_start=True,
        )
    ]
    bits = [Series("held out", *history.curve("held_out_bits_per_byte"), dots=True)]
    for source in history.sources():
        points = np.array(history.held_out.get((source, "bits_per_byte"), ()), dtype=np.float64).reshape(-1, 2)
        bits.append(Series(source, points[:, 0], points[:, 1], dots=True))
    charts.append(chart("Held-out bits per byte", bits, "step", _more(len(bits)), marks, cut_start=True))
    for title, names, x in _CURVES:
        series = [Series(label, *history.curve(name, x)) for name, label in names if _tells(history, name)]
        charts.append(chart(title, series, x, zero=names[0][0] in _FROM_ZERO))
    return charts


def _tells(history: History, name: str) -> bool:
    """Whether a curve says more than one number would."""
    _, values = history.curve(name)
    return name not in _UNVARIED or bool(len(values) and np.nanmax(values) > np.nanmin(values))


def _more(count: int) -> str:
    return f"The first {COLOURS} of {count}; the table above has all." if count > COLOURS else ""


def _samples(path: Any) -> str:
    """The samples of the last step that has any, and of those before, folded."""
    if not path.exists():
        return ""
    by_step: dict[Any, list[str]] = {}
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            sample = json.loads(line)
            prompt, continuation, step = sample["prompt"], sample["text"], sample.get("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        words = f"<pre><b>{page.text(prompt)}</b>{page.text(continuation)}</pre>"
        by_step.setdefault(str(step), []).append(f'<div class="box">{words}</div>')
    if not by_step:
        return ""
    *earlier, (last, shown) = by_step.items()
    folded = [f"<details><summary>step {page.text(s)}</summary>{''.join(boxes)}</details>" for s, boxes in earlier]
    return f'<p class="soft">after step {page.text(last)}; the prompt is bold</p>{"".join(shown)}{"".join(folded)}'


def _starts(manifest: Mapping[str, Any]) -> str:
    rows, before = [], None
    for run in _runs(manifest):
        git, devices = run.get("git"), run.get("devices")
        revision = f"{str(_get(git, 'revision'))[:10]}{' + changes' if _get(git, 'dirty') else ''}" if git else ""
        config = run.get("config")
        changed = "" if before is None else ", ".join(_differences(before, config))
        device = f"{_get(devices, 'count')} × {_get(devices, 'kind')}" if devices else ""
        rows.append([run.get("started"), run.get("from_step"), device, revision, run.get("command_line"), changed])
        before = config
    return page.table(("started", "from step", "devices", "git", "command", "changed in the configuration"), rows)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in {**old, **new}:
            found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if old == new else [f"{name}: {old} → {new}"]


def _environment(manifest: Mapping[str, Any]) -> str:
    host, mesh = manifest.get("host"), manifest.get("mesh")
    axes = {name: size for name, size in mesh.items() if size != 1} if isinstance(mesh, Mapping) else None
    return page.facts(
        [
            ("system", _get(host, "system")),
            ("CPU cores", _get(host, "cpu_count")),
            ("mesh", "one device" if axes == {} else _pairs(axes)),
            ("seeds", _pairs(manifest.get("seeds"))),
            ("python", manifest.get("python")),
            ("packages", _pairs(manifest.get("packages"))),
            ("variables", _pairs(manifest.get("environment"))),
        ]
    )


def _tree(manifest: Mapping[str, Any], name: str, unfolded: int = 0) -> str:
    return page.tree(name, manifest[name], unfolded=unfolded) if manifest.get(name) else ""


def _first_moe_layer(manifest: Mapping[str, Any]) -> int:
    first = _get(manifest, "config", "model", "ffn", "first_k_dense_replace")
    return first if isinstance(first, int) else 0


def _runs(manifest: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    runs = manifest.get("runs")
    return [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, list) else []


def _pairs(value: Any) -> str | None:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _get(value: Any, *names: str) -> Any:
    """The value at a path of names, or None where the path ends early."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
