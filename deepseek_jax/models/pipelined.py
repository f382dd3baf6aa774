"""The long stack of layers as a pipeline: its weights regrouped by stage, a chunk of layers at a tick, statistics joined.

The stack is that of the MoE layers; in a dense model, of all layers. Weights are stored in shards over all axes, `stage`
too, whatever the schedule. Once a step they are cast to the compute dtype, filled up with empty layers to S · V chunks of
equal length and handed to their stages: an exchange of the parts that each device holds already (all-to-all), where
gathering would give every device all layers. Its transpose brings gradients back. An empty layer is computed, since all
stages work in step, and thrown away.

What is not in that stack (embedding, a MoE model's leading dense layers, final norm, multi-token modules, head and loss)
has no stage of its own: each stage does it for its share of the batch, as the `batch` axis says.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.models.block import Block, remat_policy, rematerialised
from deepseek_jax.parallel.pipeline import Pipeline, cut, joined, pipelined, stages_of_mesh
from deepseek_jax.parallel.rules import Names, Weight, shard
from deepseek_jax.types import Array, RouterStats

_EXACT = {"norm", "router"}
"""Logical axes of weights that layers read in their own dtype: norms, router."""
_LAYER_IN = "layer_in"


@jax.custom_vjp
def _narrow(low: Array, wide: Array) -> Array:
    """`low`, with the gradient going to `wide`, the same weight in float32: there the sum over microbatches is taken."""
    return low


_narrow.defvjp(lambda low, wide: (low, None), lambda _, d: (None, d.astype(at_least_float32(d.dtype))))


def pipelined_stack(
    config: ModelConfig, pipeline: Pipeline, variables: Any, x_BTD: Array, context: Context, *, moe: bool
) -> tuple[Array, RouterStats | None]:
    """A stack's result [B, T, D] and a MoE stack's statistics, as the loop over layers gives them.

    Args:
        config: of the model.
        pipeline: microbatches and chunks.
        variables: "params" and, where there are selection biases, "router" of the stack, layer dim first.
        x_BTD: what comes into the first layer.
        context: of the whole piece.
        moe: whether this is the stack of MoE layers.

    Raises:
        ValueError: see `Pipeline.check_model`, `Pipeline.check_layers` and `Pipeline.check_rows`.
    """
    L = check_stack(config, pipeline, moe)
    S, V = stages_of_mesh(), pipeline.chunks
    per = -(-L // (S * V))
    filled = S * V * per > L
    block: Any = rematerialised(Block, config)(
        config, moe=moe, parent=None
    )  # no submodule: applied to parts of the stack

    def chunk(weights: Any, v: Array, x: Array, context: Context) -> tuple[Array, RouterStats | None]:
        low, wide, real = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, v, 0, keepdims=False), weights)

        def layer(x: Array, own: tuple[Any, Array]) -> tuple[Array, RouterStats | None]:
            variables, real = own
            y, (stats, _) = block.apply(variables, checkpoint_name(x, _LAYER_IN), context)
            return jnp.where(real, y, x) if filled else y, stats

        unroll = 1 if config.scan_layers else per
        return lax.scan(layer, x, (jax.tree.map(_narrow, low, wide), real), unroll=unroll)

    # Recomputed by the layers' own rule once more, a tick at a time: else each tick would keep its chunk's weights.
    stage = jax.checkpoint(chunk, policy=remat_policy(config, _LAYER_IN), prevent_cse=False)
    real = by_stage(jnp.arange(L) < L, S, V)
    low, wide = regrouped(config, variables, names_of(config, moe, x_BTD, context), S, V)
    y_BTD, stats = pipelined(stage, pipeline, (low, wide, real), x_BTD, context)
    if not moe:
        return y_BTD, None
    counted_M = counted_tokens(context.valid, pipeline.microbatches)
    return y_BTD, together(jax.tree.map(lambda x: by_layer(x, L), stats), counted_M)


def check_stack(config: ModelConfig, pipeline: Pipeline, moe: bool) -> int:
    """How many layers go through the pipeline.

    Raises:
        ValueError: see `pipelined_stack`.
    """
    pipeline.check_model(config)
    layers = config.num_moe_layers if moe else config.num_dense_layers
    pipeline.check_layers(stages_of_mesh(), layers)
    return layers


def by_stage(x: Array, S: int, V: int) -> Array:
    """[L, …] -> [S, V, ⌈L / (S V)⌉, …], filled up with zeros: chunk c of the layers is chunk c div S of stage c mod S."""
    per = -(-x.shape[0] // (S * V))
    x = jnp.pad(x, [(0, S * V * per - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(V, S, per, *x.shape[1:]).swapaxes(0, 1)


def names_of(config: ModelConfig, moe: bool, x_BTD: Array, context: Context) -> Any:
    """Logical axes of a layer's variables."""
    block: Any = Block(config, moe=moe, parent=None)
    boxed = jax.eval_shape(block.init, jax.random.key(0), x_BTD, context)
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, Weight))


def low_dtype(config: ModelConfig, leaf: Array, axes: Names) -> Any:
    """The dtype that layers read a weight in."""
    return leaf.dtype if set(axes) & _EXACT else config.dtype


def regrouped(config: ModelConfig, variables: Any, names: Any, S: int, V: int) -> tuple[Any, Any]:
    """Each weight at its stage [S, V, ⌈L / (S V)⌉, …], in the dtype that layers compute in, and again in float32.

    The second never exists in the forward pass: it is where the gradients go.
    """

    def at_stage(leaf: Array, axes: Names, dtype: Any) -> Array:
        leaf = shard(leaf.astype(dtype), "layers", *axes)  # cast first: half the bytes travel
        return shard(by_stage(leaf, S, V), "stages", "none", "layers", *axes)

    def low(leaf: Array, axes: Names) -> Array:
        return lax.stop_gradient(at_stage(leaf, axes, low_dtype(config, leaf, axes)))

    def wide(leaf: Array, axes: Names) -> Array:
        return at_stage(leaf, axes, at_least_float32(config.dtype))

    return jax.tree.map(low, variables, names), jax.tree.map(wide, variables, names)


def by_layer(x: Array, L: int) -> Array:
    """Of the stages' statistics [S, V, M, layers of a chunk, …] those of the layers: [L, M, …]."""
    x = jnp.moveaxis(x, (1, 0, 3), (0, 1, 2))
    return x.reshape(-1, *x.shape[3:])[:L]


def counted_tokens(valid_BT: Array, M: int) -> Array:
    """How many tokens each microbatch counts, int32 [M]."""
    return cut(valid_BT, M).sum(axis=(2, 3)).T.reshape(M)


def together(stats: RouterStats, counted: Array) -> RouterStats:
    """Statistics of microbatches [L, M, …] as those of the whole piece [L, …].

    Args:
        stats: of the microbatches.
        counted: [M] or [L, M], tokens that each one counts.
    """

    def sequences(x_LMR: Array) -> Array:
        L, _, R = x_LMR.shape
        at_home = jnp.moveaxis(x_LMR, 0, -1).reshape(-1, stages_of_mesh(), R, L)  # [M / S, S, R, L]
        return joined(at_home.swapaxes(0, 1)).T

    counted = counted.astype(stats.entropy.dtype)
    return RouterStats(
        load=stats.load.sum(axis=1),
        balance_loss={name: sequences(loss) for name, loss in stats.balance_loss.items()},
        entropy=(stats.entropy * counted).sum(axis=1) / jnp.maximum(counted.sum(axis=-1), 1),
        dropped=stats.dropped.sum(axis=1),
        overflow=stats.overflow.sum(axis=1),
        valid_sequences=sequences(stats.valid_sequences),
    )
