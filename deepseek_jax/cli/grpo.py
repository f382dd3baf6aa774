"""`deepseek-jax grpo CONFIG.py [--run-dir DIR] [--FIELD VALUE …]`: reinforcement learning from rewards."""

from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.cli.train import run_verb


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, learn."""
    run_verb("grpo", args, "Teach a model by rewards, or continue the run in its folder.", _grpo)


def _grpo() -> tuple[type, Callable[..., Any]]:
    from deepseek_jax.posttrain.grpo import GRPO, grpo

    return GRPO, grpo
