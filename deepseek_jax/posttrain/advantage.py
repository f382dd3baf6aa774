"""How much better a completion is than the others of its prompt: the baseline that GRPO has instead of a critic.

DeepSeekMath (arXiv 2402.03300), sections 4.1.2 and 4.1.3; V3.2, section 3.1, leaves the standard deviation out.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from deepseek_jax.types import Array

Scale = Literal["group", "batch", "none"]
"""What rewards less their group's mean are divided by: the group's standard deviation (DeepSeekMath, R1), that of the
whole batch, or nothing (V3.2, Dr. GRPO)."""

_LEAST = 1e-6
"""Added to a standard deviation, and what counts as none: equal rewards differ by rounding once they are weighted sums."""


def group_advantages(
    reward_B: Array, group_B: Array, groups: int, scale: Scale = "group", counted_B: Array | None = None
) -> tuple[Array, Array]:
    """Advantages of outcome rewards, and which rows have a group whose rewards are all alike.

    Args:
        reward_B: float: one reward a completion, finite.
        group_B: int32 in [0, groups): the prompt of each.
        groups: number of prompts.
        scale: see `Scale`.
        counted_B: bool: rows whose reward is known; the others are left out of every mean and get 0. None: all.

    Returns:
        Float [B], of the dtype of `reward_B` and without gradient; bool [B], True where nothing is to be learned.
    """

    weight_B = jnp.ones_like(reward_B) if counted_B is None else counted_B.astype(reward_B.dtype)

    def mean(x_B: Array) -> Array:
        sums = jax.ops.segment_sum(x_B * weight_B, group_B, groups)
        counts = jax.ops.segment_sum(weight_B, group_B, groups)
        return (sums / jnp.maximum(counts, 1))[group_B]

    centred = (reward_B - mean(reward_B)) * weight_B
    deviation = jnp.sqrt(mean(jnp.square(centred)))
    alike = deviation < _LEAST
    if scale == "group":
        centred = centred / (deviation + _LEAST)
    elif scale == "batch":
        centred = centred / (jnp.std(reward_B, where=weight_B > 0) + _LEAST)
    elif scale != "none":
        raise ValueError(f"scale = {scale!r}: must be 'group', 'batch' or 'none'")
    return jax.lax.stop_gradient(jnp.where(alike, 0, centred)), alike


def process_advantages(reward_BT: Array, ends_BT: Array, group_B: Array, groups: int) -> Array:
    """Advantages of rewards given to steps of a completion (DeepSeekMath, section 4.1.3): [B, T].

    Rewards are normalised over all steps of all completions of a prompt; a token's advantage is the sum of those of the
    steps that end at or after it.

    Args:
        reward_BT: float: the reward of the step that ends at a token; anything elsewhere.
        ends_BT: bool: tokens at which a step ends.
        group_B: int32 in [0, groups): the prompt of each completion.
        groups: number of prompts.
    """

    def total(x_BT: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(ends_BT, x_BT, 0).sum(axis=1), group_B, groups)

    counts = jnp.maximum(total(jnp.ones_like(reward_BT)), 1)
    centred = reward_BT - (total(reward_BT) / counts)[group_B][:, None]
    deviation = jnp.sqrt(total(jnp.square(centred)) / counts)[group_B][:, None]
    normalised = jnp.where(ends_BT & (deviation >= _LEAST), centred / (deviation + _LEAST), 0)
    return jax.lax.stop_gradient(jnp.flip(jnp.cumsum(jnp.flip(normalised, axis=1), axis=1), axis=1))
