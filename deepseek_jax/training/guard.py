"""Which updates are applied: none that is not finite and, where asked for, none that spikes.

All of it happens on the device, inside the step: a bad update leaves parameters, moments, selection bias and the count
of updates as they were, whether or not the host is looking.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from deepseek_jax.training.config import SpikeSkip
from deepseek_jax.types import Array


@struct.dataclass
class Guard:
    """What the guard remembers."""

    skipped: Array
    """Int32: updates left out so far."""
    in_a_row: Array
    """Int32: those since the last applied one."""
    seen: Array
    """Int32: losses and norms recorded so far."""
    losses: Array
    """Float [window]: losses of the last applied updates, in a ring; [0] without spike skipping."""
    norms: Array
    """Float [window]: their gradient norms."""


def init_guard(config: SpikeSkip | None, dtype: Any = jnp.float32) -> Guard:
    """Nothing seen yet."""
    window = 0 if config is None else config.window
    # An array each: a step gives its input's memory away, and one buffer cannot be given twice.
    skipped, in_a_row, seen = (jnp.zeros((), jnp.int32) for _ in range(3))
    losses, norms = (jnp.zeros(window, dtype) for _ in range(2))
    return Guard(skipped=skipped, in_a_row=in_a_row, seen=seen, losses=losses, norms=norms)


def judge(config: SpikeSkip | None, guard: Guard, loss: Array, grad_norm: Array) -> tuple[Array, Guard]:
    """Whether to apply the update that `loss` and `grad_norm` belong to, and the guard after it.

    A spike lies more than σ standard deviations above the mean of the window, in loss or gradient norm. What is left
    out is not recorded, so a run with a bad batch goes on as one without it.
    """
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    losses, norms, seen = guard.losses, guard.norms, guard.seen
    if config is not None:
        enough = seen >= config.window // 2
        known = jnp.arange(config.window) < seen
        for value, ring in ((loss, losses), (grad_norm, norms)):
            mean = jnp.mean(ring, where=known)
            bound = mean + config.sigma * jnp.std(ring, where=known)
            ok &= ~enough | (value <= bound)
        place = seen % config.window
        losses = jnp.where(ok, losses.at[place].set(loss.astype(losses.dtype)), losses)
        norms = jnp.where(ok, norms.at[place].set(grad_norm.astype(norms.dtype)), norms)
    skip = (~ok).astype(jnp.int32)
    return ok, Guard(
        skipped=guard.skipped + skip,
        in_a_row=(guard.in_a_row + 1) * skip,
        seen=seen + (1 - skip if config is not None else 0),
        losses=losses,
        norms=norms,
    )


def chosen(ok: Array, new: Any, old: Any) -> Any:
    """`new` where the update is applied, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether every number of every floating leaf is finite."""
    floating = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([_finite(leaf) for leaf in floating])) if floating else jnp.array(True)


def _finite(leaf: Array) -> Array:
    """Nothing is computed in the host's memory: what lies there comes to the device, stacks of matrices one at a time."""
    if jax.typeof(leaf).memory_space != jax.memory.Space.Host:
        return jnp.isfinite(leaf).all()

    def fetched(part: Array) -> Array:
        return jnp.isfinite(jax.device_put(part, jax.memory.Space.Device)).all()

    return lax.map(fetched, leaf).all() if leaf.ndim > 2 else fetched(leaf)
