"""The table of results.json in Markdown: `python experiments/distill_vs_rl/table.py results.json`."""

import json
import sys
from pathlib import Path
from typing import Any

MODELS = {
    "base": "V3-style base",
    "r1-zero": "R1-Zero",
    "cold-start": "cold-start SFT",
    "reasoning-rl": "+ reasoning RL",
    "sft": "SFT from the base on its samples",
    "all-rl": "+ RL over all scenarios: R1",
    "student-base": "dense student's base",
    "student-rl": "RL on the student",
    "student-sft": "SFT on R1's samples",
    "student-on-policy": "+ on-policy distillation",
}
"""Stage -> what the table calls the model that it leaves, in the table's order."""


def markdown(results: dict[str, Any]) -> str:
    """A line a model: shares of held-out problems that greedy answers solve."""
    rows = [results["rows"][name] for name in MODELS if name in results["rows"]]
    if not rows:
        return "no model is evaluated yet\n"
    counts = {part: rows[0]["accuracy"][part][1] for part in ("chain", "chain2", "mixed", "all")}
    head = [f"{part} ({count})" for part, count in counts.items()]
    head[-1] = f"**all** ({counts['all']}), 95 %"
    remarks = rows[0]["remarks"]
    lines = [
        f"| model | {' | '.join(head)} | tokens | steps | English | remarks ({remarks}): true, full | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['accuracy'][part][0] / row['accuracy'][part][1]:.3f}" for part in ("chain", "chain2", "mixed")]
        right, count, low, high = row["accuracy"]["all"]
        english = "–" if row["english"] is None else f"{row['english']:.2f}"
        lines.append(
            f"| {MODELS[row['model']]} | {' | '.join(cells)} | **{right / count:.3f}** ({low:.3f}–{high:.3f}) "
            f"| {row['tokens']:.1f} | {row['writes_steps']:.2f} | {english} "
            f"| {row['true'] / remarks:.2f}, {row['full'] / remarks:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
