"""The model run from caches, layer by layer: what prefill and decoding are made of.

Training scans over stacked parameters, which compiles one layer for all. A decoding step would spend its time copying each
layer's weights out of the stack first, so here every layer has arrays of its own, cast once to the compute dtype; or, where
sixty layers would compile for too long, its stacks stay and layers run in a loop.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import platform
from deepseek_jax.config import ModelConfig
from deepseek_jax.layers.cache import LayerCache, cache_shapes
from deepseek_jax.layers.context import Context
from deepseek_jax.models.block import Block
from deepseek_jax.models.mtp import MTPModule
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array

Cache = tuple[LayerCache, ...]
"""A layer's cache each, or a stack's where layers run in a loop; that of the first multi-token module last where it is wanted."""


@struct.dataclass
class LayerWeights:
    """Variables of a model with its layers apart, in the compute dtype."""

    ends: Any
    """Of `DeepSeek`: embedding, final norm, head."""
    layers: tuple[Any, ...]
    """Of a `Block` each; looped: of the dense ones and of the MoE ones, stacked, where there are any."""
    mtp: tuple[Any, ...]
    """Of a `MTPModule` each."""
    few_rows: bool = struct.field(pytree_node=False, default=False)
    """Whether matrices are turned so that the dim that decoding sums over comes last."""
    looped: bool = struct.field(pytree_node=False, default=False)
    """Whether layers run in a loop over their stacks."""

    def turned_back(self) -> "LayerWeights":
        """The same as the modules want it. Inside a program: the compiler reads the turned matrices where they are."""
        if not self.few_rows:
            return self

        def back(path: Any, leaf: Array) -> Array:
            order = _summed_last(path[-1].key, leaf.shape)
            return leaf if order is None else leaf.transpose(np.argsort(order))

        return replace(jax.tree_util.tree_map_with_path(back, self), few_rows=False)


def unstack(
    model: DeepSeek, variables: Any, *, few_rows: bool = False, looped: bool = False, consume: bool = False
) -> LayerWeights:
    """The variables layer by layer, in the compute dtype; norms, router and selection biases stay as they are.

    Args:
        model: the model.
        variables: as `model.init` gives them, on any mesh; each part keeps its shards.
        few_rows: turn matrices so that the dim a decoding step sums over comes last: a GPU reads them faster for a few
            rows of input. Not of `looped` weights.
        looped: leave stacks as they are, for a loop over them: compiled in the time and memory of two layers.
        consume: free each array once its copy is made, so that no second copy of the whole model exists; arrays that need
            no change are taken over.
    """
    c = model.config
    assert not (few_rows and looped)
    stacks = {"dense_layers": c.num_dense_layers, "moe_layers": c.num_moe_layers, "mtp": c.num_nextn_predict_layers}
    apart: dict[str, list[Any]] = {name: [{} for _ in range(count)] for name, count in stacks.items()}
    ends: dict[str, Any] = {}
    uses = Counter(id(leaf) for leaf in jax.tree.leaves(variables))  # one array may stand in two places

    def taken(path: Any, leaf: Any, count: int | None) -> Any:
        leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        new = _taken(path, leaf, c, few_rows, count)
        uses[id(leaf)] -= 1
        if new is leaf:
            return leaf if consume else jnp.array(leaf, copy=True)
        if consume and not uses[id(leaf)]:
            jax.block_until_ready(new)
            leaf.delete()
        return new

    for collection, tree in variables.items():
        for name, sub in tree.items():
            flat, shape = jax.tree_util.tree_flatten_with_path(sub)
            count = None if looped and name.endswith("_layers") else stacks.get(name)
            columns = [taken(path, leaf, count) for path, leaf in flat]
            if name in stacks and count is None:
                apart[name] = apart[name][:1]
                apart[name][0][collection] = shape.unflatten(columns)
            elif count is None:
                ends.setdefault(collection, {})[name] = shape.unflatten(columns)
            for i in range(count or 0):
                apart[name][i][collection] = shape.unflatten([column[i] for column in columns])
    layers = (*apart["dense_layers"], *apart["moe_layers"])
    return LayerWeights(ends=ends, layers=layers, mtp=tuple(apart["mtp"]), few_rows=few_rows, looped=looped)


def _taken(path: Any, leaf: Array, config: ModelConfig, few_rows: bool, count: int | None) -> Any:
    """A leaf as a step wants it; with `count`, a tuple of that many, of the slices along its first dim."""
    name, names = path[-1].key, {entry.key for entry in path}
    dtype = leaf.dtype if name in ("scale", "bias") or "router" in names else jnp.dtype(config.dtype)
    order = _summed_last(name, leaf.shape[count is not None :]) if few_rows else None
    if count is None and order is None and leaf.dtype == dtype:
        return leaf
    where: Any = None
    sharding = None if isinstance(leaf, Tracer) else leaf.sharding
    if isinstance(sharding, NamedSharding):
        axes = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))][count is not None :]
        where = NamedSharding(sharding.mesh, PartitionSpec(*(axes if order is None else [axes[i] for i in order])))
    return _changed(leaf, dtype, order, count, where)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _changed(leaf: Array, dtype: Any, order: tuple[int, ...] | None, count: int | None, where: Any) -> Any:
    def one(x: Array) -> Array:
        x = (x if order is None else x.transpose(order)).astype(dtype)
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    return one(leaf) if count is None else tuple(one(leaf[i]) for i in range(count))


_TURNED = 2**23  # numbers of a matrix up to which the order matters; a larger product keeps a GPU busy in the usual one


def _summed_last(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Order of a matrix' dims with the one that decoding sums over last; None where the matrix stays as it is.

    The rule gives the same answer, a matrix or none, for the turned shape.
    """
    if len(shape) == 3 and name in ("w_gate", "w_up", "w_down"):
        return (0, 2, 1)
    if len(shape) < 2 or math.prod(shape) > _TURNED or name == "embedding" or name.startswith("b_"):
        return None
    special = {"w_uk": (1, 0, 2), "w_o": (2, 0, 1)}
    return special.get(name, (1, 2, 0) if len(shape) == 3 else (1, 0))


def init_cache(
    config: ModelConfig, batch: int, length: int, *, mtp: bool = False, looped: bool = False, dtype: str | None = None
) -> Cache:
    """Empty caches: zeros, sharded over the ambient mesh by the rule table.

    Args:
        config: of the model.
        batch: sequences, B.
        length: places of a sequence, S.
        mtp: with one for the first multi-token module.
        looped: for weights of which that is said.
        dtype: of the entries; None is the compute dtype.
    """
    return tuple(
        {key: shard(jnp.zeros(shape, dtype or config.dtype), *names) for key, (shape, names) in one.items()}
        for one in model_cache_shapes(config, batch, length, mtp=mtp, looped=looped)
    )


def model_cache_shapes(
    config: ModelConfig, batch: int, length: int, *, mtp: bool = False, looped: bool = False
) -> list[dict[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    """Of each part of `init_cache`: name -> shape and logical axes."""
    one = cache_shapes(config.attention, batch, length, tiled=platform.target() == "tpu")
    if not looped:
        return [one] * (config.num_hidden_layers + mtp)
    stacks = [
        {key: ((shape[0], count, *shape[1:]), (names[0], "layers", *names[1:])) for key, (shape, names) in one.items()}
        for count in (config.num_dense_layers, config.num_moe_layers)
        if count
    ]
    return [*stacks, *[one] * mtp]


def extend(
    model: DeepSeek, weights: LayerWeights, tokens: Array, positions: Array, cache: Cache, fresh: bool = False
) -> tuple[Array, Cache, Array | None]:
    """Hidden states of new tokens that see the cached ones, and the cache with the new ones in it.

    Args:
        model: the model.
        weights: from `unstack`, turned back.
        tokens: integer [B, T] ids.
        positions: int32 [B, T]: the place of each token, which is also its row of the cache; padding has a place past
            the cache's end. Consecutive in a row of the batch.
        cache: from `init_cache`, or from the call before; a multi-token module's goes through untouched.
        fresh: nothing is cached yet, and every row starts at place 0: faster for long prompts.

    Returns:
        [B, T, D] after the final norm, the cache, and the experts of each token, int32 [L, B, T, X] over the MoE layers,
        None for a dense model.
    """
    c = model.config
    x_BTD, context = model.apply(weights.ends, tokens, positions, fresh, method="begin")
    new, experts = list(cache), []
    for i, variables in enumerate(weights.layers):
        if weights.looped:
            x_BTD, new[i], chosen = _loop(c, variables, x_BTD, context, cache[i], moe=i > 0 or not c.num_dense_layers)
        else:
            x_BTD, new[i], chosen = _layer(c, variables, x_BTD, context, cache[i], moe=i >= c.num_dense_layers)
        if chosen is not None:
            experts.append(chosen)
    hidden_BTD = model.apply(weights.ends, x_BTD, method="finish")
    together = jnp.concatenate if weights.looped else jnp.stack  # a loop's are those of all its layers
    return hidden_BTD, tuple(new), together(experts) if experts else None


def _layer(
    config: ModelConfig, variables: Any, x_BTD: Array, context: Context, cache: LayerCache, *, moe: bool
) -> tuple[Array, LayerCache, Array | None]:
    block: Any = Block(config, moe=moe)  # linen types `apply` as what `mutable` would give
    x_BTD, (stats, cache) = block.apply(variables, x_BTD, context, cache)
    return x_BTD, cache, None if stats is None else stats.experts


def _loop(
    config: ModelConfig, stack: Any, x_BTD: Array, context: Context, cache: LayerCache, *, moe: bool
) -> tuple[Array, LayerCache, Array | None]:
    """As `_layer`, of all layers of a stack. All caches are carried, so that a step writes its tokens' rows alone."""

    def body(carry: tuple[Array, LayerCache], one: tuple[Any, Array]) -> tuple[tuple[Array, LayerCache], Array | None]:
        (x_BTD, kept), (variables, layer) = carry, one
        x_BTD, kept, experts = _layer(config, variables, x_BTD, context, kept | {"layer": layer}, moe=moe)
        return (x_BTD, {name: kept[name] for name in cache}), experts

    layers = jnp.arange(config.num_moe_layers if moe else config.num_dense_layers)
    (x_BTD, cache), experts = lax.scan(body, (x_BTD, cache), (stack, layers))
    return x_BTD, cache, experts


def draft(
    model: DeepSeek, weights: LayerWeights, hidden: Array, following: Array, positions: Array, cache: Cache,
    fresh: bool = False,
) -> tuple[Array, Cache]:  # fmt: skip
    """The first multi-token module over new tokens: the state whose head predicts the token after the next.

    Args:
        model: a model with multi-token prediction.
        weights: from `unstack`, turned back.
        hidden: [B, T, D] of tokens i, from `extend`.
        following: integer [B, T]: tokens i + 1.
        positions: int32 [B, T] of tokens i, as in `extend`.
        cache: with the module's own as the last.
        fresh: see `extend`.

    Returns:
        [B, T, D], after the module's norm, and the cache.
    """
    c = model.config
    embedded_BTD, context = model.apply(weights.ends, following, positions, fresh, method="begin")
    module: Any = MTPModule(c)
    out, (_, _, kept) = module.apply(weights.mtp[0], hidden, embedded_BTD, context.valid, context, cache[-1])
    return out, (*cache[:-1], kept)


def head(model: DeepSeek, weights: LayerWeights, hidden: Array) -> Array:
    """Logits of hidden states, [B, T, D] -> float32 [B, T, W]."""
    return model.apply(weights.ends, hidden, method="head")


__all__ = ["Cache", "LayerWeights", "draft", "extend", "head", "init_cache", "unstack"]
