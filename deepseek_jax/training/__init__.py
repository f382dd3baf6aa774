"""Training runs: configuration, objective, step, loop."""

from deepseek_jax.training.certify import certify
from deepseek_jax.training.config import AdamW, RunConfig, SpikeSkip
from deepseek_jax.training.interrupt import Stopped
from deepseek_jax.training.loop import train
from deepseek_jax.training.lora import LoRA
from deepseek_jax.training.recipes import extended, scaled_down
from deepseek_jax.training.run import Run
from deepseek_jax.training.schedule import BatchRamp, ByTokens, MultiStep, Phase, Phases
from deepseek_jax.training.trouble import NotFinite, SaveFailed, TrainingFailed

__all__ = [
    "AdamW", "BatchRamp", "ByTokens", "LoRA", "MultiStep", "NotFinite", "Phase", "Phases", "Run", "RunConfig", "SaveFailed",
    "SpikeSkip", "Stopped", "TrainingFailed", "certify", "extended", "scaled_down",
    "train",
]  # fmt: skip
