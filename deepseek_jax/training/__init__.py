"""Training runs: configuration, objective, step, loop."""

from deepseek_jax.training.config import AdamW, MultiStep, RunConfig
from deepseek_jax.training.loop import Run, train

__all__ = ["AdamW", "MultiStep", "Run", "RunConfig", "train"]
