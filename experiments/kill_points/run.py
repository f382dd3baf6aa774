"""The quickstart, killed with SIGKILL at random moments and started again until done: every line as if it never was.

    python experiments/kill_points/run.py [--kills 20] [--seed 0]

Runs `deepseek-jax train configs/quickstart.py --steps 60 --checkpoint-every 7 --log-every 1` once unbroken and again with
kills, and compares every number of every line of metrics.jsonl but the speeds. jax's compilation cache is on, so that
the kills fall into steps and saves rather than into compilations. Writes results.jsonl beside this file.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from deepseek_jax.metrics.manifest import git_revision, package_versions
from deepseek_jax.metrics.writer import read_jsonl

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent.parent / "configs" / "quickstart.py"
FLAGS = ("--steps", "60", "--checkpoint-every", "7", "--log-every", "1")


def start(run_dir: Path, cache: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "deepseek_jax.cli.main", "train", str(CONFIG), "--run-dir", str(run_dir), *FLAGS]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = read_jsonl(path) if path.exists() else []
    return lines[-1]["step"] if lines else -1


def numbers(run_dir: Path) -> list[dict]:
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "mfu")} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    records: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        whole, broken, cache = (Path(temporary) / name for name in ("whole", "broken", "cache"))
        said, _ = (child := start(whole, cache)).communicate()
        assert child.returncode == 0, said
        for kill in range(options.kills):
            before = last_step(broken)
            child = start(broken, cache)
            # A third of the kills fall anywhere from the start on, the others a few steps after the run goes on.
            if draw.random() < 1 / 3:
                time.sleep(draw.uniform(1, 15))
            else:
                goal = max(before, 0) + draw.randrange(3)
                while last_step(broken) <= goal and child.poll() is None:
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 1.5))
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            said, _ = child.communicate()
            assert child.returncode in (0, -9), said
            records.append({"kill": kill + 1, "resumed_near": before, "killed_after_line_of_step": last_step(broken)})
            print(records[-1], flush=True)
            if child.returncode == 0:
                break
        said, _ = (child := start(broken, cache)).communicate()
        assert child.returncode == 0, said
        ours, theirs = numbers(broken), numbers(whole)
        different = [a["step"] for a, b in zip(ours, theirs, strict=True) if json.dumps(a) != json.dumps(b)]
    verdict = {
        "kills": len(records), "lines": len(theirs), "different_lines": different, "seed": options.seed,
        "jax": jax.__version__, "packages": package_versions(), "git": git_revision(),
    }  # fmt: skip
    records.append(verdict)
    (HERE / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{verdict['kills']} kills, {verdict['lines']} lines, different: {different or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
