"""`deepseek-jax r1 CONFIG.py [--run-dir DIR]`: several stages of post-training, one after the other."""

from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.cli.train import run_verb


def run(args: Sequence[str]) -> None:
    """Load the config file, run its stages, or go on in the one that was cut off."""
    run_verb("r1", args, "Run the stages of a pipeline such as R1's, or go on in the one that was cut off.", _r1)


def _r1() -> tuple[type, Callable[..., Any]]:
    from deepseek_jax.posttrain.r1 import R1, r1

    return R1, r1
