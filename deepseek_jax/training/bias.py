"""V3's auxiliary-loss-free balancing (section 2.1.2; Wang et al., arXiv 2408.15664): the update of the selection bias."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.types import Array, RouterStats


def updated_bias(bias_LE: Array, load_LE: Array, speed: Array | float) -> Array:
    """b_i + γ · sign(mean load − load_i), layer by layer; an expert at the mean keeps its bias.

    The load is that of the whole global batch of an optimizer step, and this is called once per step.
    """
    # E times the error: a sum of counts is exact, where a rounded mean would move a perfectly balanced layer.
    error_LE = load_LE.sum(axis=-1, keepdims=True) - load_LE.shape[-1] * load_LE
    return bias_LE + (speed * jnp.sign(error_LE)).astype(bias_LE.dtype)


def update_router(router: Any, stats: dict[str, RouterStats], speed: Array | float) -> Any:
    """The `router` collection after a step: every stack's bias moved by that stack's load."""
    return {
        name: jax.tree.map(lambda bias, name=name: updated_bias(bias, stats[name].load, speed), group)
        for name, group in router.items()
    }


def max_violation(load_LE: Array) -> Array:
    """MaxVio of each layer: highest load over the mean, minus 1 (arXiv 2408.15664, eq. 4). 0 is perfect balance."""
    mean_L = jnp.maximum(load_LE.mean(axis=-1), 1e-20)
    return load_LE.max(axis=-1) / mean_L - 1


def bias_spread(group: Any) -> Array:
    """Largest less smallest selection bias of each layer, of one stack's part of the `router` collection."""
    [bias_LE] = jax.tree.leaves(group)
    return bias_LE.max(axis=-1) - bias_LE.min(axis=-1)
