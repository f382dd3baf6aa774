"""The demonstration of run.py for several seeds, beside its controls: `run.py --study` calls `run_study`.

Of each seed one base model, and from it GRPO in four ways; then a base that never saw steps, and GRPO from that one.
results.jsonl gets a line a run as soon as it is there; lines of other seeds than those asked for stay.
"""

import dataclasses
import datetime
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from run import ANSWER, Setting, pretrain, reinforce, say

from deepseek_jax.metrics.manifest import git_revision, package_versions
from deepseek_jax.posttrain.objective import PolicyLoss

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.jsonl"
_DR_GRPO = PolicyLoss(aggregation="dr_grpo", max_tokens=ANSWER, clip_high=0.28, kl=0.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "main": dict(loss=_DR_GRPO),
    "length-normalised": dict(loss=dataclasses.replace(_DR_GRPO, aggregation="grpo", max_tokens=None)),
    "KL 0.02": dict(loss=dataclasses.replace(_DR_GRPO, kl=0.02)),
    "shuffled rewards": dict(loss=_DR_GRPO, shuffled=True),
    "no steps in the corpus": dict(loss=_DR_GRPO, written=0.0, gate=None),
}
FIGURES = ("greedy_before", "greedy_after", "length_before", "length_after")


def run_study(seeds: Sequence[int], setting: Setting | None = None) -> None:
    """Every variant of every seed; then the picture, and the table of the README."""
    kept = [line for line in read() if line["seed"] not in seeds] if RESULTS.exists() else []
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    head = {"device": device, "packages": package_versions()}
    git = git_revision()  # of what is running, whatever is committed meanwhile
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/programs")  # the seeds run the same ones
        for seed in seeds:
            for line in of_seed(dataclasses.replace(setting or Setting(), seed=seed), Path(folder) / str(seed)):
                date = datetime.datetime.now(datetime.UTC).date().isoformat()
                kept.append({**line, "date": date, "git": git})
                write(head, kept)
    draw(read())
    print(table(read()))


def of_seed(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """A line a variant. A seed whose base is not through the gate gets one line, which says so."""
    base, found = pretrain(setting, folder / "main")
    if not found["gated"]:
        yield {"variant": "main", "seed": setting.seed, **found}
        return
    for number, (variant, changes) in enumerate(VARIANTS.items()):
        began, cpu = time.perf_counter(), time.process_time()
        changed = dataclasses.replace(setting, **changes)
        say(f"--- seed {setting.seed}, {variant}")
        if changed.written != setting.written:  # as many steps as the base with steps had
            changed = dataclasses.replace(changed, pretraining_steps=found["pretraining_steps"])
            base, found = pretrain(changed, folder / "other")
        result = reinforce(changed, base, folder / f"rl-{number}")
        seconds = {"seconds": round(time.perf_counter() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        yield {"variant": variant, "seed": setting.seed, **found, **seconds, **result}


def write(head: dict[str, Any], lines: Sequence[dict[str, Any]]) -> None:
    lines = sorted(lines, key=lambda line: (line["seed"], list(VARIANTS).index(line["variant"])))
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)), encoding="utf-8")


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()[1:]]


def interval(values: Sequence[float], digits: int) -> str:
    """Mean ± half the 95 % interval of the mean, by Student's t over seeds."""
    from scipy.stats import t

    mean, count = np.mean(values), len(values)
    if count < 2:
        return f"{mean:.{digits}f}"
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a variant, means over seeds; then the seeds one by one."""
    rows = [
        "| variant | seeds | greedy accuracy before | after | greedy length before | after | samples right, last 5 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        its = [line for line in lines if line["variant"] == variant and "curve" in line]
        if its:
            cells = [interval([line[name] for line in its], 3 if "greedy" in name else 1) for name in FIGURES]
            cells.append(interval([float(np.mean(line["curve"]["reward"][-5:])) for line in its], 3))
            rows.append(f"| {variant} | {len(its)} | {' | '.join(cells)} |")
    rows += [
        "",
        "| seed | pre-training steps | of the base's samples, with steps | these right | others right | "
        + " | ".join(VARIANTS)
        + " |",
        "|---" * (5 + len(VARIANTS)) + "|",
    ]
    for seed in sorted({line["seed"] for line in lines}):
        its = {line["variant"]: line for line in lines if line["seed"] == seed}
        main = its["main"]
        skills = " | ".join(f"{main[name]:.2f}" for name in ("writes_steps", "right_with_steps", "right_without"))
        cells = (
            f"{its[v]['greedy_after']:.3f}, {its[v]['length_after']:.1f}" if "greedy_after" in its.get(v, {}) else "–"
            for v in VARIANTS
        )
        rows.append(f"| {seed} | {main['pretraining_steps']} | {skills} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(lines: Sequence[dict[str, Any]]) -> None:
    """Accuracy and length of the samples by step: a column a variant, a thin line a seed, their mean thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(2, len(VARIANTS), sharex=True, sharey="row")
    for column, variant in enumerate(VARIANTS):
        curves = [line["curve"] for line in lines if line["variant"] == variant and "curve" in line]
        for row, name in enumerate(("reward", "length_mean")):
            for curve in curves:
                axes[row, column].plot(
                    range(1, len(curve[name]) + 1), curve[name], color=f"C{column}", alpha=0.35, lw=1
                )
            if curves:
                mean = np.mean([curve[name] for curve in curves], axis=0)
                axes[row, column].plot(range(1, len(mean) + 1), mean, color=f"C{column}", lw=2)
        axes[0, column].set_title(f"{variant}\n{len(curves)} seeds", fontsize=10)
        axes[1, column].set_xlabel("GRPO step")
    axes[0, 0].set(ylabel="accuracy at temperature 1", ylim=(0, 1.02))
    axes[1, 0].set(ylabel="tokens of a completion", ylim=(0, ANSWER + 0.3))
    figure.savefig(HERE / "curves.png", dpi=110)
