"""One optimizer step as a pure function of state and batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.parallel.hosts import Rows
from deepseek_jax.parallel.mesh import compiler_options
from deepseek_jax.parallel.rules import named_sharding
from deepseek_jax.training.bias import bias_spread, max_violation, update_router
from deepseek_jax.training.config import RunConfig
from deepseek_jax.training.guard import chosen, judge
from deepseek_jax.training.lora import merged
from deepseek_jax.training.loss import Losses, loss_parts, make_totals
from deepseek_jax.training.optimizer import make_optimizer
from deepseek_jax.training.schedule import RATES, rates
from deepseek_jax.training.state import TrainState, abstract_state
from deepseek_jax.types import Array

Batch = dict[str, Array]
Metrics = dict[str, Any]
BATCH_AXES = ("batch", "none")
"""Logical axes of a batch's arrays: their T + 1 places are cut into inputs and targets before a sequence is split."""
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(config: RunConfig) -> TrainStep:
    """The pure function `train_step(state, batch) -> (state, metrics)` of a run.

    A batch has a multiple of `config.piece_size` sequences, worked off in pieces of that size. Learning rate, λ and γ
    are those of the update number `state.step`.
    """
    rates_UR = rates(config)
    depth = config.model.num_nextn_predict_layers
    wide = at_least_float32(config.model.dtype)

    def rates_at(update: Array) -> dict[str, Array]:
        row = jnp.asarray(rates_UR, wide)[jnp.minimum(update, len(rates_UR) - 1)]
        return dict(zip(RATES, row, strict=True))

    on_host = config.moments_on == "host"
    optimizer = make_optimizer(config.optimizer, lambda update: rates_at(update)["learning_rate"], on_host=on_host)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def whole(trained: Any) -> Any:
            return trained if config.lora is None else merged(config.lora, state.lora["base"], trained)

        totals = make_totals(batch, depth, wide)
        now = rates_at(state.step)

        def piece(batch: Batch) -> tuple[Any, Array, Losses]:
            def objective(trained: Any) -> tuple[Array, Losses]:
                return loss_parts(config, whole(trained), state.router, batch, totals, now["mtp_loss_weight"])

            (total, losses), grads = jax.value_and_grad(objective, has_aux=True)(state.trained)
            # A mean over tokens, of which pieces hold different numbers: summed over selections until all are added up.
            router = {k: replace(v, entropy=v.entropy * v.load.sum(axis=-1)) for k, v in losses.router.items()}
            return grads, total, replace(losses, router=router)

        pieces = _pieces(config, batch)
        grads, total, losses = _summed(piece, batch, pieces)
        grads = jax.tree.map(lambda grad: grad.astype(at_least_float32(grad.dtype)), grads)
        grad_norm = optax.tree.norm(grads)
        ok, guard = judge(config.spike_skip, state.guard, total, grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained, ok=ok)
        # Moments at the host are chosen by the update, which has them a layer at a time.
        opt_state = jax.tree.map(
            lambda new, old: new if on_host and new.ndim else jnp.where(ok, new, old), opt_state, state.opt_state
        )
        trained: Any = optax.apply_updates(state.trained, updates)
        params = whole(trained)
        router = state.router
        if router:
            router = update_router(router, losses.router, now["bias_update_speed"])
        new = TrainState(
            step=state.step + 1,
            params=params,
            router=router,
            opt_state=opt_state,
            ema=_running_mean(config.ema_decay, state.ema, params),
            guard=guard,
            lora={**state.lora, "adapters": trained} if state.lora else {},
        )
        new = replace(
            chosen(ok, replace(new, opt_state=()), replace(state, opt_state=())), opt_state=opt_state, guard=guard
        )
        metrics = {
            "loss": total,
            "loss_main": losses.main,
            "loss_mtp": losses.mtp,
            "loss_balance": losses.balance,
            "grad_norm": grad_norm,
            **now,
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.in_a_row,
            "router": {
                name: {
                    "load": stats.load,
                    "max_violation": max_violation(stats.load),
                    "entropy": stats.entropy / jnp.maximum(stats.load.sum(axis=-1), 1),
                    "dropped": stats.dropped / jnp.maximum(stats.load.sum(axis=-1), 1),
                    "overflow": stats.overflow / jnp.maximum(stats.load.sum(axis=-1), 1),
                    **({"bias_spread": bias_spread(new.router[name])} if name in new.router else {}),
                }
                for name, stats in losses.router.items()
            },
        }
        return new, metrics

    return train_step


def _pieces(config: RunConfig, batch: Batch) -> int:
    """In how many pieces a batch is worked off."""
    rows = batch["tokens"].shape[0]
    if rows % config.piece_size:
        raise ValueError(
            f"a batch of {rows} sequences: must be a multiple of batch_size / accumulation = {config.piece_size}"
        )
    return rows // config.piece_size


def _running_mean(decay: float | None, ema: Any, params: Any) -> Any:
    """decay · mean + (1 - decay) · parameters, in the mean's dtype, float32 or wider."""
    if decay is None:
        return ema
    return jax.tree.map(lambda mean, param: decay * mean + (1 - decay) * param.astype(mean.dtype), ema, params)


def _summed(piece: Callable[[Batch], Any], batch: Batch, accumulation: int) -> Any:
    """Sum of `piece` over the batch in `accumulation` parts, each a part of every device's sequences."""
    if accumulation == 1:
        return piece(batch)
    # Every accumulation-th sequence, so that a batch sharded over devices stays where it is.
    parts = {k: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0) for k, x in batch.items()}

    def add(carry: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, _without_sequences(piece(part))), None

    shapes = jax.eval_shape(lambda: _without_sequences(piece({k: x[0] for k, x in parts.items()})))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, at_least_float32(leaf.dtype)), shapes)
    return lax.scan(add, zeros, parts)[0]


def _without_sequences(result: tuple[Any, Array, Losses]) -> tuple[Any, Array, Losses]:
    """Per-sequence values left out: they are in the losses already and do not add up over parts."""
    grads, total, losses = result
    router = {k: replace(v, balance_loss={}, valid_sequences=jnp.zeros(())) for k, v in losses.router.items()}
    return grads, total, replace(losses, router=router)


def compile_train_step(config: RunConfig, mesh: Mesh) -> TrainStep:
    """`train_step` jitted for a mesh: shardings of state and batch stated, the old state's memory reused."""
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # With output shardings unstated, the gradient of a sharded weight comes back replicated.
    # Metrics replicated, since a process can read only what its devices hold.
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        make_train_step(config), in_shardings=(state, None), out_shardings=(state, whole), donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )  # fmt: skip


def place_batch(batch: dict[str, Any], mesh: Mesh, here: Rows | None = None) -> Batch:
    """A host batch of [B, T + 1] arrays, spread over the mesh by sequence.

    Args:
        batch: the arrays, [B, T + 1]; or, with `here`, [b, T + 1]: the rows that this process' devices hold.
        mesh: where they go; it may reach over several processes, which all call this.
        here: which rows of the whole batch `batch` has. None: all of them, the same on every process.
    """

    def place(name: str, x: Any) -> Array:
        x = np.asarray(x)
        shape = x.shape if here is None else (here.of, *x.shape[1:])
        sharding = named_sharding(mesh, BATCH_AXES, shape, f"batch {name!r}")

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0])
            if here is not None:
                first, last = np.searchsorted(here.numbers, (first, last))
            return x[(slice(first, last), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return {name: place(name, x) for name, x in batch.items()}


def host_line(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a step as numbers and lists; the multi-token loss is the mean over depths."""
    line = jax.tree.map(np.asarray, metrics)
    depths = line.pop("loss_mtp")
    if depths.size:
        line["loss_mtp"] = depths.mean()
        if depths.size > 1:
            line["loss_mtp_by_depth"] = depths
    return {
        name: value.item() if getattr(value, "ndim", None) == 0 else jax.tree.map(np.ndarray.tolist, value)
        for name, value in line.items()
        if name != "skipped_in_a_row"
    }
