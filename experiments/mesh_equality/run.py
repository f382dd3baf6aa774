"""Losses, gradients, loads and the moved bias of every layout beside one device's, for four members' tiny twins.

    JAX_PLATFORMS=cpu python experiments/mesh_equality/run.py [--models v3 v2 …] [--layouts fsdp …]

float32 on 8 virtual CPU devices; the layouts are those of tests/test_mesh_equality.py. A figure is the largest difference
of any element, over the largest element of its array. Writes results.csv and table.md beside this file.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import jax  # noqa: E402  (the number of devices is read once)
import numpy as np  # noqa: E402
from helpers import micro, run_config  # noqa: E402
from test_mesh_equality import LAYOUTS, numbers  # noqa: E402

from deepseek_jax.metrics.manifest import package_versions  # noqa: E402
from deepseek_jax.parallel import MeshConfig  # noqa: E402

MODELS = ("v3", "v2", "moe", "llm-gqa")
PARTS = ("total", "mtp", "balance", "grads", "stats", "router")


def difference(ours: Any, alone: Any) -> float:
    """Largest difference of any leaf, over that leaf's largest value."""
    found = [0.0]
    for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(alone), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        if e.size and np.abs(e).max() > 0:
            found.append(float(np.abs(a - e).max() / np.abs(e).max()))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    options = parser.parse_args()
    rows = []
    for model in options.models:

        def run_of(model: str = model, **fields: Any) -> Any:
            return run_config(micro(model, dtype="float32", **fields))

        alone = numbers(run_of(), MeshConfig(), 1)
        for name in options.layouts:
            degrees, fields = LAYOUTS[name]
            if "expert" in degrees and "moe_layers" not in alone["stats"]:
                continue
            start = time.perf_counter()
            try:
                ours = numbers(run_of(**fields), MeshConfig(**({"data": -1} | degrees)), 8)
            except ValueError as error:  # a tiny twin may have fewer heads than a layout has shards
                print(f"{model} on {name}: refused: {error}", flush=True)
                continue
            row = {part: difference(ours[part], alone[part]) for part in PARTS}
            rows.append({"model": model, "layout": name, **{k: f"{v:.1e}" for k, v in row.items()}})
            print(*rows[-1].values(), f"({time.perf_counter() - start:.0f} s)", flush=True)
    with open(HERE / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("model", "layout", *PARTS))
        writer.writeheader()
        writer.writerows(rows)
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items() if name in ("jax", "flax"))
    lines = [f"{time.strftime('%Y-%m-%d')}, 8 virtual CPU devices, {versions}.", ""]
    lines += ["| model | layout | " + " | ".join(PARTS) + " |", "|" + "---|" * (len(PARTS) + 2)]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
