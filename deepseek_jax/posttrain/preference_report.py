"""How right a judge of answers is, and whether it is as sure as it is right."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from deepseek_jax import storage
from deepseek_jax.metrics.writer import plain

Report = dict[str, Any]
BINS = 10


def calibration(probability_N: Any, outcome_N: Any, *, low: float = 0.0, bins: int = BINS) -> Report:
    """Reliability: what was predicted against what came, and the expected calibration error (Guo et al. 2017, eq. 3).

    ECE = Σ_b n_b / N · |mean outcome of bin b − mean probability of bin b|, over bins of equal width.

    Args:
        probability_N: of the outcome 1, float [N] in [low, 1].
        outcome_N: float [N] in [0, 1].
        low: where the first bin begins.
        bins: how many.

    Returns:
        ece, brier (mean squared difference), and bins: from, to, count, and of those with a count predicted and observed.
    """
    probability, outcome = np.asarray(probability_N, np.float64), np.asarray(outcome_N, np.float64)
    edges = np.linspace(low, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for b in range(bins):
        here = place == b
        line: Report = {"from": float(edges[b]), "to": float(edges[b + 1]), "count": int(here.sum())}
        if here.any():
            line |= {"predicted": float(probability[here].mean()), "observed": float(outcome[here].mean())}
            error += here.mean() * abs(line["observed"] - line["predicted"])
        table.append(line)
    return {"ece": float(error), "brier": float(np.mean((probability - outcome) ** 2)), "bins": table}


def report_pairs(margin_B: Any, tokens_B2: Any) -> Report:
    """Of pairs: score of the chosen answer minus that of the rejected one, float [B], and their lengths, int [B, 2].

    The model's probability that it is right is σ(|margin|), and it is right where the margin is positive; an even pair
    is half right. So bins begin at ½. `by_length` says whether it merely prefers what is longer.
    """
    margin, tokens = np.asarray(margin_B, np.float64), np.asarray(tokens_B2)
    right = (np.sign(margin) + 1) / 2
    longer = {"chosen_longer": tokens[:, 0] > tokens[:, 1], "chosen_shorter": tokens[:, 0] < tokens[:, 1]}
    return {
        "examples": len(margin),
        "loss": float(np.logaddexp(0, -margin).mean()),
        "accuracy": float(right.mean()),
        "margin": float(margin.mean()),
        "calibration": calibration(_sigmoid(np.abs(margin)), right, low=0.5),
        "by_length": {
            name: {"examples": int(rows.sum()), "accuracy": float(right[rows].mean()) if rows.any() else None}
            for name, rows in longer.items()
        },
    }


def report_labels(score_B: Any, label_B: Any) -> Report:
    """Of answers with a label in [0, 1], by logits: float [B] each. A label counts as 1 above ½, a score above 0."""
    score, label = np.asarray(score_B, np.float64), np.asarray(label_B, np.float64)
    positive = label > 0.5
    scores = {name: score[rows] for name, rows in (("positive", positive), ("negative", ~positive))}
    return {
        "examples": len(score),
        "loss": float((np.logaddexp(0, -score) * label + np.logaddexp(0, score) * (1 - label)).mean()),
        "accuracy": float(((score > 0) == positive).mean()),
        "calibration": calibration(_sigmoid(score), label),
        "by_label": {
            name: {"examples": len(its), "accuracy": float(((its > 0) == (name == "positive")).mean()) if len(its) else None}
            for name, its in scores.items()
        },
    }  # fmt: skip


def report_numbers(score_B: Any, label_B: Any) -> Report:
    """Of answers with a number: mean squared error halved (the loss), mean error, Pearson's correlation (0 for constants)."""
    score, label = np.asarray(score_B, np.float64), np.asarray(label_B, np.float64)
    varied = score.std() > 0 and label.std() > 0
    return {
        "examples": len(score),
        "loss": float(((score - label) ** 2).mean() / 2),
        "error": float(np.abs(score - label).mean()),
        "bias": float((score - label).mean()),
        "correlation": float(np.corrcoef(score, label)[0, 1]) if varied else 0.0,
    }


def figures(report: Report) -> dict[str, float]:
    """The numbers of a report for metrics.jsonl."""
    found = {name: value for name, value in report.items() if isinstance(value, float)}
    reliability = report.get("calibration", {})
    return found | {name: reliability[name] for name in ("ece", "brier") if name in reliability}


def readable(report: Report, title: str) -> str:
    """A report for a person to read."""
    lines = [f"{title}: {report['examples']} held-out examples", ""]
    lines += [f"{name:<12} {value:.4f}" for name, value in figures(report).items()]
    for name in ("by_length", "by_label"):
        for part, values in report.get(name, {}).items():
            accuracy = "      " if values["accuracy"] is None else f"{values['accuracy']:.4f}"
            lines.append(f"{'accuracy':<12} {accuracy}  of {values['examples']} {part.replace('_', ' ')}")
    if "calibration" in report:
        lines += ["", "probability    predicted  observed  examples"]
        for line in report["calibration"]["bins"]:
            seen = f"{line['predicted']:9.3f} {line['observed']:9.3f}" if line["count"] else f"{'–':>9} {'–':>9}"
            lines.append(f"{line['from']:.2f} to {line['to']:.2f}  {seen} {line['count']:9}")
    return "\n".join(lines) + "\n"


def write_report(run_dir: Any, step: int, report: Report, title: str) -> None:
    """Writes evaluations/step_….json and .txt."""
    name = run_dir / "evaluations" / f"step_{step:06}"
    storage.write_atomic(name.with_suffix(".json"), json.dumps(plain(report, "report"), indent=1) + "\n")
    storage.write_atomic(name.with_suffix(".txt"), readable(report, f"{title}, step {step}"))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
