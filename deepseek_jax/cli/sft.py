"""`deepseek-jax sft CONFIG.py [--run-dir DIR] [--FIELD VALUE …]`: supervised fine-tuning on conversations."""

from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.cli.train import run_verb


def run(args: Sequence[str]) -> None:
    """Load the config file, apply the overrides, fine-tune."""
    run_verb("sft", args, "Fine-tune a model on conversations, or continue the run in its folder.", _sft, hosts=True)


def _sft() -> tuple[type, Callable[..., Any]]:
    import deepseek_jax as dsj

    return dsj.SFT, dsj.sft
