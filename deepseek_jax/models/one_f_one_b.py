"""The objective of a model whose long stack of layers is a 1F1B pipeline: one function whose gradient comes with its value.

Layers and their weights are as in models/pipelined.py, with the backward pass written out: a stage keeps the input of each
layer, works the layer out again when its gradient has come, and adds up the gradients of weights in float32. Autodiff sees
one function of weights and embedded tokens, which gives value and gradient together where a gradient is asked for, and
otherwise runs the forward pass alone.

Final norm, multi-token modules, head and losses are the tail of parallel/one_f_one_b.py. Its weights are cast and gathered
over `stage` once a step, over other axes whenever they are used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.block import Block
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.pipelined import (
    by_layer,
    by_stage,
    check_stack,
    counted_tokens,
    low_dtype,
    names_of,
    pipelined_stack,
    regrouped,
    together,
)  # fmt: skip
from deepseek_jax.models.transformer import DeepSeek, Entry
from deepseek_jax.parallel.one_f_one_b import Given, Work, one_f_one_b, places
from deepseek_jax.parallel.pipeline import Pipeline, stages_of_mesh
from deepseek_jax.parallel.rules import Weight, shard
from deepseek_jax.types import Array, HiddenOutput, RouterStats

Loss = Callable[[HiddenOutput, Array, Any, Any], tuple[Array, Any]]
_BEHIND = ("final_norm", "mtp")


def pipelined_objective(
    config: ModelConfig, pipeline: Pipeline, loss: Loss, variables: Any, w_DW: Array, entry: Entry, targets: Any,
    shared: Any, sequences: Array,
) -> tuple[Array, Any, dict[str, RouterStats]]:  # fmt: skip
    """Σ of the loss over microbatches, plus the balance losses of the pipeline's layers over `sequences`.

    Gradients flow from the scalar alone, to `variables`, `w_DW`, `entry.x` and `entry.following`.

    Args:
        config: of the model.
        pipeline: microbatches and chunks.
        loss: `(hidden output, w_DW, targets, shared) -> (scalar, more)` of some sequences, where both are sums over
            sequences; the hidden output has the statistics of multi-token modules alone. It closes over no array.
        variables: of the model.
        w_DW: the head's weight.
        entry: what `DeepSeek.enter` gives for the piece.
        targets: tree of [1 + depth, B, T].
        shared: the same for all sequences.
        sequences: scalar; those of the whole batch that balance losses are a mean over.

    Returns:
        The scalar, float32 or wider; what else the loss gave, summed; statistics of all routers over the piece.

    Raises:
        ValueError: see `pipelined_stack`.
    """
    moe = config.num_moe_layers > 0
    stack = "moe_layers" if moe else "dense_layers"
    L = check_stack(config, pipeline, moe)
    depth, wide = config.num_nextn_predict_layers, at_least_float32(config.dtype)
    own = {kind: tree[stack] for kind, tree in variables.items() if stack in tree}
    behind = {kind: {name: tree[name] for name in _BEHIND if name in tree} for kind, tree in variables.items()}
    rest = entry.context, (_apart(entry.valid, depth), _apart(targets, 1 + depth)), shared, sequences

    def tail(weights: Any, x: Array, context: Context, inputs: Any, constants: Any, shared: Any) -> Any:
        (behind, w_DW), (valid, targets) = weights, constants
        within = Entry(x, context, *(_stacked(parts) if depth else None for parts in (inputs, valid)))
        out = DeepSeek(config).apply(behind, within, method="leave")
        total, more = loss(out, w_DW, _stacked(targets), shared)
        counted = jnp.zeros(0) if within.valid is None else within.valid.sum(axis=(1, 2))
        return total, (more, out.router, counted)

    def joined(stats: Any, sequences: Array, total: Array, more: Any, router: dict[str, RouterStats]) -> Any:
        if stats is not None:
            router = {"moe_layers": stats, **router}
            total += sum(loss_LB.sum() for loss_LB in stats.balance_loss.values()) / sequences
        return total, more, router

    @jax.custom_vjp
    def objective(own: Any, behind: Any, w_DW: Array, x: Array, following: Any, rest: Any) -> Any:
        context, constants, shared, sequences = rest
        x, stats = pipelined_stack(config, pipeline, own, x, context, moe=moe)
        total, (more, router, _) = tail((behind, w_DW), x, context, following, constants, shared)
        return joined(stats, sequences, total, more, router)

    def with_gradient(own: Any, behind: Any, w_DW: Array, x: Array, following: Any, rest: Any) -> Any:
        context, constants, shared, sequences = rest
        S, V, M = stages_of_mesh(), pipeline.chunks, pipeline.microbatches
        names = names_of(config, moe, x, context)
        wide_weights, to_layers, low = jax.vjp(lambda own: regrouped(config, own, names, S, V)[::-1], own, has_aux=True)
        ends, end_names = (behind, w_DW), (_behind_names(config), ("embed", "vocab"))
        low_ends = jax.tree.map(lambda w, axes: w.astype(low_dtype(config, w, axes)), ends, end_names)
        real = by_stage(jnp.arange(L) < L, S, V)
        per, shape = real.shape[2], (x.shape[0] // M, *x.shape[1:])
        kept = jnp.zeros((S, sum(places(S, V)), per, *shape), x.dtype)
        weights = low, real, jnp.where(real, 1 / sequences, 0).astype(wide)
        given = Given(weights, low_ends, x, context, following, constants, shared)
        total, (more, router, counted), stats, d = one_f_one_b(
            _work(config, moe, tail, filled=real.size > L),
            pipeline,
            given,
            shard(kept, "stages", "none", "layers", "batch", "length", "act_embed"),
            jax.tree.map(lambda w, axes: _zeros(w.shape, wide, "stages", "none", "layers", *axes), wide_weights, names),
            jax.tree.map(lambda w, axes: _zeros((S, *w.shape), wide, "stages", *axes), ends, end_names),
        )
        stats = jax.tree.map(lambda leaf: by_layer(leaf, L), stats)
        stats = together(stats, counted_tokens(context.valid, M)) if moe else None
        router = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), router)
        router = {name: together(one, counted.T) for name, one in router.items()}
        more = jax.tree.map(lambda x: x.sum(axis=0), more)
        [d_own] = to_layers(d.weights)
        d_behind, d_w = jax.tree.map(
            lambda d, w, axes: shard(d.sum(axis=0), *axes).astype(w.dtype), d.tail_weights, ends, end_names
        )
        return joined(stats, sequences, total, more, router), (d_own, d_behind, d_w, d.x, d.inputs)

    def scaled(gradients: Any, d: Any) -> Any:
        return *jax.tree.map(lambda gradient: (gradient * d[0]).astype(gradient.dtype), gradients), None

    objective.defvjp(with_gradient, scaled)
    total, *more = objective(own, behind, w_DW, entry.x, _apart(entry.following, depth), rest)
    return total, *lax.stop_gradient(more)


def _work(config: ModelConfig, moe: bool, tail: Any, filled: bool) -> Work:
    """What a stage does with its layers. Weights are (low, real, d): a layer's variables, whether it is none to fill up
    (`filled`: there are such), and the gradient of the objective by its balance losses; all [V, layers of a chunk, …]."""
    block: Any = Block(config, moe=moe, parent=None)  # no submodule: applied to parts of the stack

    def run(variables: Any, real: Array, x: Array, context: Context) -> tuple[tuple[Array, Array], Any]:
        y, (stats, _) = block.apply(variables, x, context)
        losses = [] if stats is None else [loss_B.sum() for loss_B in stats.balance_loss.values()]
        balance = sum(losses, jnp.zeros((), at_least_float32(config.dtype)))
        return (jnp.where(real, y, x) if filled else y, balance), stats

    def at(tree: Any, i: Array, j: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[i, j], tree)

    def with_at(tree: Any, i: Array, j: Array, value: Any) -> Any:
        # Not `.at[i, j]`, which is a scatter: this writes in place everywhere.
        def one(leaf: Array, value: Array) -> Array:
            return lax.dynamic_update_slice(leaf, value[None, None], (i, j, *[0] * value.ndim))

        return jax.tree.map(one, tree, value)

    def over_layers(step: Any, carry: Any, per: int, reverse: bool) -> Any:
        return lax.scan(step, carry, jnp.arange(per), reverse=reverse, unroll=1 if config.scan_layers else per)

    def forward(weights: Any, v: Array, x: Array, context: Context, kept: Array, place: Array) -> Any:
        def layer(carry: Any, i: Array) -> Any:
            x, kept = carry
            low, real, _ = at(weights, v, i)
            (y, _), stats = run(low, real, x, context)
            return (y, with_at(kept, place, i, x)), stats

        (x, kept), stats = over_layers(layer, (x, kept), kept.shape[1], False)
        return x, kept, stats

    def backward(
        weights: Any, v: Array, context: Context, kept: Array, place: Array, d: Array, active: Array, sums: Any
    ) -> Any:
        def layer(carry: Any, i: Array) -> Any:
            d, sums = carry
            low, real, d_balance = at(weights, v, i)
            _, back, _ = jax.vjp(lambda low, x: run(low, real, x, context), low, kept[place, i], has_aux=True)
            d_low, d = back((d, jnp.where(active, d_balance, 0)))
            added = jax.tree.map(lambda sum_, d: sum_ + d.astype(sum_.dtype), at(sums, v, i), d_low)
            return (d, with_at(sums, v, i, added)), None

        return over_layers(layer, (d, sums), kept.shape[1], True)[0]

    return Work(forward, backward, tail)


def _behind_names(config: ModelConfig) -> Any:
    """Logical axes of the variables of what follows the layers."""
    boxed = abstract_variables(config)
    names = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, Weight))
    return {kind: {name: tree[name] for name in _BEHIND if name in tree} for kind, tree in names.items()}


def _zeros(shape: Sequence[int], dtype: Any, *names: str) -> Array:
    return shard(jnp.zeros(shape, dtype), *names)


def _apart(tree: Any, count: int) -> tuple[Any, ...]:
    """Leaves [count, B, …] as so many trees of [B, …]."""

    def one(k: int) -> Any:
        return jax.tree.map(lambda leaf: leaf[k], tree)

    return tuple(one(k) for k in range(count))


def _stacked(parts: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
