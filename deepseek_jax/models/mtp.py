"""Multi-token prediction (V3, section 2.2): module k sees the state of depth k − 1 and the embedding of token i + k."""

from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig, MoE
from deepseek_jax.layers.cache import LayerCache
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.linear import linear
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.weights import for_product, weight
from deepseek_jax.models.block import Block
from deepseek_jax.types import Array, RouterStats


class MTPModule(nn.Module):
    """h^k = norm(Block(W [RMSNorm(Emb(t_i+k)); RMSNorm(h^(k-1))])) (V3 eq. 21–22); head and embedding are the main model's.

    The embedding half comes first, as in the published weights (the paper prints the other order). The state handed
    from depth to depth is the one after the norm: the main model's after its final norm.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden_BTD: Array,
        embedded_BTD: Array,
        valid_BT: Array,
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Array, tuple[Array, RouterStats | None, LayerCache | None]]:
        """State of the depth before, embedding of token i + k, positions that have a target -> new state, and again with
        the router's statistics and the cache with these tokens in it."""
        c, D = self.config, hidden_BTD.shape[-1]
        embedded = RMSNorm(c.rms_norm_eps, c.param_dtype, name="embedding_norm")(embedded_BTD)
        hidden = RMSNorm(c.rms_norm_eps, c.param_dtype, name="hidden_norm")(hidden_BTD)
        w_proj = weight(
            self, "w_proj", (2 * D, D), ("embed", "act_embed"), dtype=c.param_dtype, stddev=c.initializer_range
        )
        w_proj = for_product(w_proj, hidden.dtype, c.wide_sums)
        joined = linear("bti,id->btd", jnp.concatenate([embedded, hidden], axis=-1), w_proj)
        x = checkpoint_name(joined, "mtp_in")
        block = Block(c, moe=isinstance(c.ffn, MoE), name="block")
        x, (stats, cache) = block(x, replace(context, valid=valid_BT), cache)
        out = RMSNorm(c.rms_norm_eps, c.param_dtype, name="norm")(x)
        return out, (out, stats, cache)
