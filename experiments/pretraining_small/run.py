"""Trains the small twins of the LLM, MoE, V2 and V3 recipes, 200 steps each, from their config files; draws the losses.

    python experiments/pretraining_small/run.py [--seeds 0 1] [--runs DIR]

Writes results.jsonl (a line a logged step, with recipe and seed) and curves.png beside this file.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import jax

import deepseek_jax as dsj
from deepseek_jax.cli.train import load_config
from deepseek_jax.metrics.manifest import git_revision, package_versions

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs"
RECIPES = ("llm_7b", "moe_16b", "v2", "v3")
KEPT = (
    "step", "tokens", "batch_size", "learning_rate", "mtp_loss_weight", "bias_update_speed", "loss", "loss_main",
    "loss_mtp", "loss_balance", "grad_norm", "skipped", "held_out_loss", "held_out_bits_per_byte",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", help="where the run folders go (default: a temporary folder)")
    options = parser.parse_args()
    lines = [
        {
            "jax": jax.__version__, "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "packages": package_versions(), "git": git_revision(),
        }
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        for recipe in RECIPES:
            config = load_config(CONFIGS / f"deepseek_{recipe}_small.py")
            for seed in options.seeds:
                folder = Path(options.runs or temporary) / f"{recipe}-{seed}"
                run = dsj.train(dataclasses.replace(config, seed=seed), folder)
                for line in run.metrics:
                    kept = {name: line[name] for name in KEPT if name in line}
                    router = line.get("router", {}).get("moe_layers", {})
                    spread = {"max_violation": max(router["max_violation"])} if router else {}
                    lines.append({"recipe": recipe, "seed": seed, **kept, **spread})
    (HERE / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw(lines[1:])


def draw(lines: list[dict]) -> None:
    """Next-token loss of every run over its tokens, and its held-out bits per byte before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, recipe in zip(figure.subplots(2, 2).flat, RECIPES, strict=True):
        for seed in sorted({line["seed"] for line in lines}):
            own = [line for line in lines if (line["recipe"], line["seed"]) == (recipe, seed)]
            points = [(line["tokens"] / 1e6, line["loss_main"]) for line in own if "loss_main" in line]
            held_out = [line["held_out_bits_per_byte"] for line in own if "held_out_bits_per_byte" in line]
            label = f"seed {seed}: {held_out[0]:.2f} → {held_out[-1]:.2f} bits per byte"
            axes.plot(*zip(*points, strict=True), label=label)
        axes.set_title(f"deepseek_{recipe}_small", fontsize=10)
        axes.set_xlabel("million tokens")
        axes.set_ylabel("next-token loss, nats")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
