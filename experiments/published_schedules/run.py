"""Learning rate, batch, λ and γ of the published recipes as the code computes them, beside the papers' numbers.

    python experiments/published_schedules/run.py

Writes results.csv (recipe, quantity, tokens, paper, code) and schedules.png beside this file; fails where the code is
not within 0.5 % of the paper.
"""

import csv
from pathlib import Path

import numpy as np

from deepseek_jax.cli.train import load_config
from deepseek_jax.training.schedule import rates

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs"
T, B = 10**12, 10**9

# recipe -> quantity -> (tokens, the paper's value). Just before and after each change that a paper prints.
PAPER = {
    "llm_7b": {"learning rate": [(0.5 * T, 4.2e-4), (1.599 * T, 4.2e-4), (1.601 * T, 0.316 * 4.2e-4), (1.801 * T, 4.2e-5)]},
    "llm_67b": {"learning rate": [(0.5 * T, 3.2e-4), (1.599 * T, 3.2e-4), (1.601 * T, 0.316 * 3.2e-4), (1.801 * T, 3.2e-5)]},
    "moe_16b": {"learning rate": [(T, 4.2e-4), (1.601 * T, 0.316 * 4.2e-4), (1.801 * T, 0.316**2 * 4.2e-4)]},
    "v2_lite": {"learning rate": [(T, 4.2e-4), (4.561 * T, 0.316 * 4.2e-4), (5.131 * T, 0.316**2 * 4.2e-4)]},
    "v2": {
        "learning rate": [(T, 2.4e-4), (4.87 * T, 0.316 * 2.4e-4), (7.3 * T, 0.316**2 * 2.4e-4)],
        "batch": [(0, 2304), (226 * B, 9216), (8 * T, 9216)],
    },
    "v3": {
        "learning rate": [
            (T, 2.2e-4), (9.99 * T, 2.2e-4), (12.15 * T, 1.21e-4), (14.301 * T, 2.2e-5), (14.63 * T, 2.2e-5),
            (14.64 * T, 7.3e-6), (14.79 * T, 7.3e-6),
        ],
        "batch": [(0, 3072), (470 * B, 15360), (14 * T, 15360)],
        "λ": [(T, 0.3), (9.99 * T, 0.3), (10.01 * T, 0.1), (14.7 * T, 0.1)],
        "γ": [(T, 0.001), (14.29 * T, 0.001), (14.31 * T, 0.0)],
    },
}  # fmt: skip


def main() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), layout="constrained")
    panels = iter(figure.subplots(4, 3).flat)
    rows = []
    for recipe, quantities in PAPER.items():
        config = load_config(CONFIGS / f"deepseek_{recipe}.py")
        tokens, table = config.plan.all_tokens_before(config.last_step), rates(config)
        sizes = np.diff(tokens) // config.seq_len
        curves = {
            "learning rate": (tokens, table[:, 0]), "λ": (tokens, table[:, 1]), "γ": (tokens, table[:, 2]),
            "batch": (tokens[:-1], sizes),
        }  # fmt: skip
        for quantity, points in quantities.items():
            x, y = curves[quantity]
            for at, paper in points:
                code = float(y[np.searchsorted(x, at, side="right") - 1])
                rows.append((recipe, quantity, int(at), paper, code))
                assert abs(code - paper) <= 0.005 * abs(paper), rows[-1]
            axes = next(panels)
            axes.plot(x[::20] / T, y[::20], color="#1f5fa8", label="code")
            axes.plot([at / T for at, _ in points], [value for _, value in points], "o", color="#b3261e", label="paper")
            axes.set_title(f"{recipe}: {quantity}", fontsize=10)
            axes.set_xlabel("trillion tokens", fontsize=8)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.axis("off")
    figure.savefig(HERE / "schedules.png", dpi=100)
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("recipe", "quantity", "tokens", "paper", "code"), *rows])
    print(f"{len(rows)} numbers of the papers, all within 0.5 %")


if __name__ == "__main__":
    main()
