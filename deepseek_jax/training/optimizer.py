"""AdamW and the multi-step schedule, from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.training.config import AdamW, MultiStep
from deepseek_jax.types import Array


def learning_rate(schedule: MultiStep, steps: int, step: Any) -> Array:
    """Rate of the update that ends step `step` (counted from 0): linear to the peak, then the factors.

    DeepSeek LLM, section 2.3: 2,000 warm-up steps, ×0.316 from 80 % and ×0.1 from 90 % of the run on.
    """
    step = jnp.asarray(step)
    rate = schedule.peak * jnp.minimum((step + 1) / max(schedule.warmup_steps, 1), 1)
    share = jnp.ones_like(rate)
    for milestone, factor in zip(schedule.milestones, schedule.factors, strict=True):
        share = jnp.where(step >= milestone * steps, factor, share)
    return rate * share


def decayed(params: Any) -> Any:
    """True for every leaf that weight decay acts on: all but norm scales and biases."""

    def one(path: Any, _: Any) -> bool:
        name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
        return name != "scale" and not name.startswith("b_")

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(config: AdamW, schedule: MultiStep, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled, masked decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda step: learning_rate(schedule, steps, step),
            b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decayed,
        ),
    )  # fmt: skip
