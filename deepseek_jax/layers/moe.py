"""The DeepSeekMoE layer: routed experts plus shared experts, and what its router did.

Shared experts are one SwiGLU of width n_shared_experts · moe_intermediate_size, as in the published checkpoints.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from deepseek_jax.config import MoE
from deepseek_jax.layers.balance import affinity_entropy, balance_losses, selections, within_capacity
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.experts import Experts
from deepseek_jax.layers.mlp import SwiGLU
from deepseek_jax.layers.router import Router
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array, RouterStats


class MoELayer(nn.Module):
    """Router, routed experts, shared experts (DeepSeekMoE eq. 9, V2 eq. 20, V3 eq. 12, the residual left to the block)."""

    config: MoE
    param_dtype: str
    stddev: float

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, recorded_BTX: Array | None = None) -> tuple[Array, RouterStats]:
        """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`, and this layer's statistics without the layer dim.

        `recorded_BTX`: experts to use instead of the router's choice, −1 where that stands.
        """
        c, (B, T, D) = self.config, x_BTD.shape
        kwargs: dict[str, Any] = dict(param_dtype=self.param_dtype, stddev=self.stddev)
        scores, indices, weights = Router(c, name="router", **kwargs)(x_BTD, recorded_BTX)
        dropped = jnp.zeros((), scores.dtype)
        if context.exempt is not None and c.capacity_factor is not None:
            affinity = jnp.take_along_axis(scores, indices, axis=-1)
            kept = within_capacity(affinity, indices, context.valid, context.exempt, c)
            dropped = (~kept & context.valid[..., None]).sum().astype(scores.dtype)
            weights = weights * kept
        experts = Experts(c.n_routed_experts, c.moe_intermediate_size, name="experts", **kwargs)
        X = c.num_experts_per_tok
        flat = (x_BTD.reshape(B * T, D), indices.reshape(B * T, X), weights.reshape(B * T, X))
        out = experts(*flat, decoding=context.positions is not None)
        out = shard(out.reshape(B, T, D), "batch", "length", "act_embed")
        if c.n_shared_experts:
            out = out + SwiGLU(c.n_shared_experts * c.moe_intermediate_size, name="shared", **kwargs)(x_BTD)
        stats = RouterStats(
            load=selections(indices, context.valid, c.n_routed_experts, scores.dtype).sum(axis=(0, 1)),
            balance_loss=balance_losses(scores, indices, context.valid, c),
            entropy=affinity_entropy(scores, context.valid),
            dropped=dropped,
            valid_sequences=context.valid.any(axis=1).astype(scores.dtype),
            experts=None if context.positions is None else indices,
        )
        return out, stats
