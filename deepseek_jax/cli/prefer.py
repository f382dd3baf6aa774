"""`deepseek-jax prefer CONFIG.py [--run-dir DIR] [--FIELD VALUE …]`: DPO, and reward models."""

from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.cli.train import run_verb


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, learn."""
    run_verb("prefer", args, "Learn from preferences, or continue the run in its folder.", _prefer)


def _prefer() -> tuple[type, Callable[..., Any]]:
    from deepseek_jax.posttrain.prefer import Prefer, prefer

    return Prefer, prefer
