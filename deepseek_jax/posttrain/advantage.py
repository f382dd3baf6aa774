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
"""Added to a standard deviation, and of the rewards' size what counts as none: equal rewards differ by rounding once they are
weighted sums."""


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
    alike = deviation < _LEAST * jnp.maximum(1, jnp.sqrt(mean(jnp.square(reward_B))))
    if scale == "group":
        centred = centred / (deviation + _LEAST)
    elif scale == "batch":
        centred = centred / (jnp.std(reward_B, where=weight_B > 0) + _LEAST)
    elif scale != "none":
        raise ValueError(f"scale = {scale!r}: must be 'group', 'batch' or 'none'")
    return jax.lax.stop_gradient(jnp.where(alike, 0, centred)), alike


def process_advantages(score_S: Array, row_S: Array, place_S: Array, group_B: Array, groups: int, length: int) -> Array:
    """Advantages of rewards given to steps of completions (DeepSeekMath, section 4.1.3): [B, T].

    Rewards are normalised over all steps of all completions of a prompt; a token's advantage is the sum of those of the
    steps that end at or after it.

    Args:
        score_S: float: the reward of each step.
        row_S: int32: its completion.
        place_S: int32 in [0, T): the token that it ends with.
        group_B: int32 in [0, groups): the prompt of each completion.
        groups: number of prompts.
        length: T.
    """
    group_S = group_B[row_S]

    def mean(x_S: Array) -> Array:
        counts = jax.ops.segment_sum(jnp.ones_like(x_S), group_S, groups)
        return (jax.ops.segment_sum(x_S, group_S, groups) / jnp.maximum(counts, 1))[group_S]

    centred = score_S - mean(score_S)
    deviation = jnp.sqrt(mean(jnp.square(centred)))
    varied = deviation >= _LEAST * jnp.maximum(1, jnp.sqrt(mean(jnp.square(score_S))))
    normalised = jnp.where(varied, centred / (deviation + _LEAST), 0)
    out_BT = jnp.zeros((len(group_B), length), score_S.dtype).at[row_S, place_S].add(normalised)
    return jax.lax.stop_gradient(jnp.flip(jnp.cumsum(jnp.flip(out_BT, axis=1), axis=1), axis=1))
