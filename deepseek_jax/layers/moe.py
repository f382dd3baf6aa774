"""The DeepSeekMoE layer: routed experts plus shared experts, and what its router did.

Shared experts are one SwiGLU of width n_shared_experts · moe_intermediate_size, as in the published checkpoints.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from deepseek_jax.config import MoE
from deepseek_jax.layers.balance import affinity_entropy, balance_losses, selections, within_capacity
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.expert_parallel import Exchange, parallel_experts
from deepseek_jax.layers.experts import few_tokens_experts, routed_experts
from deepseek_jax.layers.mlp import SwiGLU
from deepseek_jax.layers.router import Router
from deepseek_jax.layers.weights import weight
from deepseek_jax.parallel.rules import on_mesh, shard
from deepseek_jax.types import Array, RouterStats


class Experts(nn.Module):
    """Weights of the routed experts, stacked on the first dim."""

    n_routed_experts: int
    moe_intermediate_size: int
    param_dtype: str
    stddev: float
    exchange: Exchange = Exchange()

    @nn.compact
    def __call__(
        self, x_BTD: Array, indices_BTX: Array, weights_BTX: Array, valid_BT: Array, decoding: bool = False
    ) -> tuple[Array, Array]:
        """Σ over the chosen experts, [B, T, D], and the token-expert pairs that found no place at their expert's shard.

        `valid_BT`, `decoding`: see `parallel_experts`.
        """
        E, (B, T, D), F = self.n_routed_experts, x_BTD.shape, self.moe_intermediate_size

        def param(name: str, shape: tuple[int, ...], *axes: str) -> Array:
            return weight(self, name, shape, axes, dtype=self.param_dtype, stddev=self.stddev)

        matrices = (
            param("w_gate", (E, D, F), self.exchange.axis, "expert_embed", "ffn"),
            param("w_up", (E, D, F), self.exchange.axis, "expert_embed", "ffn"),
            param("w_down", (E, F, D), self.exchange.axis, "ffn", "expert_embed"),
        )
        if on_mesh():
            return parallel_experts(
                x_BTD, indices_BTX, weights_BTX, *matrices, valid_BT=valid_BT, exchange=self.exchange, decoding=decoding
            )
        flat = (x.reshape(B * T, -1) for x in (x_BTD, indices_BTX, weights_BTX))
        arguments = (*flat, *(w.astype(x_BTD.dtype) for w in matrices))
        out_MD = few_tokens_experts(*arguments) if decoding else None
        out_MD = routed_experts(*arguments) if out_MD is None else out_MD
        return out_MD.reshape(B, T, D), jnp.zeros((), jnp.float32)


class MoELayer(nn.Module):
    """Router, routed experts, shared experts (DeepSeekMoE eq. 9, V2 eq. 20, V3 eq. 12, the residual left to the block)."""

    config: MoE
    param_dtype: str
    stddev: float
    exchange: Exchange = Exchange()

    @nn.compact
    def __call__(self, x_BTD: Array, context: Context, recorded_BTX: Array | None = None) -> tuple[Array, RouterStats]:
        """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`, and this layer's statistics without the layer dim.

        `recorded_BTX`: experts to use instead of the router's choice, −1 where that stands.
        """
        c = self.config
        kwargs: dict[str, Any] = dict(param_dtype=self.param_dtype, stddev=self.stddev)
        scores, indices, weights = Router(c, name="router", **kwargs)(x_BTD, recorded_BTX)
        dropped = jnp.zeros((), scores.dtype)
        if context.exempt is not None and c.capacity_factor is not None:
            affinity = jnp.take_along_axis(scores, indices, axis=-1)
            kept = within_capacity(affinity, indices, context.valid, context.exempt, c)
            dropped = (~kept & context.valid[..., None]).sum().astype(scores.dtype)
            weights = weights * kept
        experts = Experts(c.n_routed_experts, c.moe_intermediate_size, exchange=self.exchange, name="experts", **kwargs)
        out, overflow = experts(x_BTD, indices, weights, context.valid, decoding=context.positions is not None)
        out = shard(out, "batch", "length", "act_embed")
        if c.n_shared_experts:
            width = c.n_shared_experts * c.moe_intermediate_size
            out = out + SwiGLU(width, wide_sums=self.exchange.wide_sums, name="shared", **kwargs)(x_BTD)
        stats = RouterStats(
            load=selections(indices, context.valid, c.n_routed_experts, scores.dtype).sum(axis=(0, 1)),
            balance_loss=balance_losses(scores, indices, context.valid, c),
            entropy=affinity_entropy(scores, context.valid),
            dropped=dropped,
            overflow=overflow.astype(scores.dtype),
            valid_sequences=context.valid.any(axis=1).astype(scores.dtype),
            experts=None if context.positions is None else indices,
        )
        return out, stats
