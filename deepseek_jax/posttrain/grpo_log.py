"""What a step of GRPO tells: figures for metrics.jsonl, and completions in full for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax import storage
from deepseek_jax.posttrain.rewards import Scores
from deepseek_jax.posttrain.sampler import Completion
from deepseek_jax.posttrain.session import Line


def show(
    run_dir: Any, number: int, count: int, completions: Sequence[Completion], scores: Scores, advantages: np.ndarray
) -> None:
    """Writes `count` completions of step `number` into the folder rollouts."""
    blocks = []
    for i in np.linspace(0, len(completions) - 1, min(count, len(completions))).round().astype(int):
        c = completions[i]
        parts = ", ".join(f"{name} {values[i]:.4g}" for name, values in scores.parts.items())
        blocks.append(
            f"=== step {number}, completion {i}: reward {scores.total[i]:.4g} ({parts}), advantage {np.mean(advantages[i]):.4g}, "
            f"{len(c.generation.tokens)} tokens, {'cut off' if c.truncated else 'ended'}, reference answer "
            f"{c.problem.answer!r}\n--- prompt\n{c.problem.prompt}\n--- completion\n{c.text}\n"
        )
    storage.write_atomic(run_dir / "rollouts" / f"step_{number:06}.txt", "\n".join(blocks))


def of_rewards(scores: Scores, alike: np.ndarray, samples: int) -> Line:
    """Figures of the rewards of groups of `samples` completions; `alike`: rows of groups without differences."""
    known = ~scores.failed
    totals = np.where(known, scores.total, np.nan).reshape(-1, samples)
    deviations = [float(np.nanstd(row)) for row in totals if not np.isnan(row).all()]
    return {
        "reward": float(scores.total[known].mean()) if known.any() else 0.0,
        "reward_std": float(np.mean(deviations)) if deviations else 0.0,
        "rewards": {
            name: {"mean": float(values.mean()), "std": float(values.std())} for name, values in scores.parts.items()
        },
        "reward_failed": float(scores.failed.mean()),
        "learned_from": float(1 - alike.mean()),
    }


def means(scores: Scores) -> Line:
    """Mean reward, and that of each part."""
    return {"reward": float(scores.total.mean())} | {name: float(x.mean()) for name, x in scores.parts.items()}


def of_lengths(completions: Sequence[Completion]) -> Line:
    """Figures of the completions' lengths, in tokens."""
    lengths = np.array([len(c.generation.tokens) for c in completions])
    truncated = np.array([c.truncated for c in completions])
    return {
        "length_mean": float(lengths.mean()),
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
        "length_ended": float(lengths[~truncated].mean()) if not truncated.all() else 0.0,
        "truncated": float(truncated.mean()),
    }


def rows_of(scores: Scores, rows: slice) -> Scores:
    """The scores of some completions."""
    parts = {name: values[rows] for name, values in scores.parts.items()}
    return Scores(
        total=scores.total[rows], parts=parts, failed=scores.failed[rows], failures={}, steps=scores.steps[rows]
    )


def joined(scores: Sequence[Scores]) -> Scores:
    """The scores of several rounds, one after the other."""
    names = dict.fromkeys(name for one in scores for name in one.parts)  # parts of a reward may lack in a round
    return Scores(
        total=np.concatenate([one.total for one in scores]),
        parts={
            name: np.concatenate([one.parts.get(name, np.zeros_like(one.total)) for one in scores]) for name in names
        },
        failed=np.concatenate([one.failed for one in scores]),
        failures={},
        steps=[steps for one in scores for steps in one.steps],
    )
