"""What an update is, whatever the loss: gradients of pieces added up, AdamW, nothing where a number is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.training.config import AdamW
from deepseek_jax.training.guard import chosen
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.types import Array

Metrics = dict[str, Array]


def summed(
    piece: Callable[[Any], tuple[Any, Metrics]], batch: Any, pieces: int, largest: tuple[str, ...] = ()
) -> tuple[Any, Metrics]:
    """Gradients, float32 or wider, and metrics of all pieces, worked off one after the other: sums, of the metrics in
    `largest` the largest.

    Args:
        piece: gradients and metrics of a part of the batch, each its share of the whole one's.
        batch: leaves with the rows first.
        pieces: must divide the rows.
        largest: names of metrics.
    """

    def wide(part: Any) -> tuple[Any, Metrics]:
        grads, metrics = piece(part)
        return jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads), metrics

    if pieces == 1:
        return wide(batch)
    if (rows := jax.tree.leaves(batch)[0].shape[0]) % pieces:
        raise ValueError(f"pieces = {pieces}: must divide the {rows} rows of an update")
    parts = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), batch)
    first, rest = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)

    def add(carry: tuple[Any, Metrics], part: Any) -> tuple[tuple[Any, Metrics], None]:
        (grads, metrics), (more_grads, more) = carry, wide(part)
        highest = {name: jnp.maximum(metrics[name], more[name]) for name in largest}
        together = {name: metrics[name] + more[name] for name in metrics} | highest
        return (jax.tree.map(jnp.add, grads, more_grads), together), None

    return lax.scan(add, wide(first), rest)[0]


def applied(
    optimizer: AdamW,
    state: Any,
    trained: Any,
    grads: Any,
    metrics: Metrics,
    learning_rate: Array,
    put: Callable[[Any], dict[str, Any]],
) -> tuple[Any, Metrics]:
    """The state after an update, and metrics with `grad_norm` and `applied`.

    Where the loss (`metrics["loss"]`) or the gradient is not finite, the state is as it was, and `applied` is False.

    Args:
        optimizer: its constants.
        state: with `step` and `opt_state`, which is the optimizer's of `trained`.
        trained: what is updated.
        grads: of it, float32 or wider.
        metrics: of the batch.
        learning_rate: of this update.
        put: from the new `trained` to fields of the state.
    """
    rule = make_optimizer(optimizer, lambda step: learning_rate)
    updates, opt_state = rule.update(grads, state.opt_state, trained)
    norm = optax.tree.norm(grads)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    new = state.replace(step=state.step + 1, opt_state=opt_state, **put(optax.apply_updates(trained, updates)))
    return chosen(ok, new, state), {**metrics, "grad_norm": norm, "applied": ok}
