"""Checkpoints: training state, data position and a note beside them, in one commit."""

from deepseek_jax.checkpoint.store import Store

__all__ = ["Store"]
