"""`deepseek-jax distill CONFIG.py [--run-dir DIR] [--FIELD VALUE …]`: learning from teachers' probabilities."""

from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.cli.train import run_verb


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, learn."""
    run_verb("distill", args, "Teach a student by its teachers' probabilities, or continue the run.", _distill)


def _distill() -> tuple[type, Callable[..., Any]]:
    from deepseek_jax.posttrain.distill import Distill, distill

    return Distill, distill
