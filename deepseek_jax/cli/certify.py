"""`deepseek-jax certify CONFIG.py [--proof-steps N] [--run-dir DIR] [overrides]`: proves exact resume on a config."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(args: Sequence[str]) -> None:
    """Train twice, once with a kill in between; print the verdict, and fail where the two differ."""
    from deepseek_jax.cli.train import load_config, override

    parser = argparse.ArgumentParser(
        prog="deepseek-jax certify",
        usage="deepseek-jax certify CONFIG.py [--proof-steps N] [--run-dir DIR] [--FIELD VALUE ...]",
        description="Train 2N steps unbroken, and again with the process killed after N; compare every bit.",
        epilog="--run-dir and the fields of the config are flags, as for `deepseek-jax train`.",
    )
    parser.add_argument("config", metavar="CONFIG.py", help="Python file that defines get_config() -> RunConfig")
    parser.add_argument("--proof-steps", type=int, default=10, metavar="N", help="steps before the kill (default 10)")
    options, rest = parser.parse_known_args(args)
    path = Path(options.config)
    config, run_dir = override(load_config(path), rest, run_dir=f"runs/{path.stem}-certificate", verb="certify")

    import deepseek_jax as dsj

    certificate = dsj.certify(config, run_dir, steps=options.proof_steps)
    if not certificate["equal"]:
        raise dsj.training.TrainingFailed(
            "the two runs differ: " + "; ".join(certificate["differences"]) + ". On a GPU, set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true: without it a program compiled twice is not one program"
        )
    print(
        f"equal bit for bit over {certificate['steps']} steps, killed after {certificate['killed_after']}: state "
        f"{certificate['state_sha256'][:16]}, metrics {certificate['losses_sha256'][:16]}; certificate in "
        f"{run_dir}/manifest.json"
    )
