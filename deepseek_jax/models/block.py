"""One decoder layer: x + attention(norm(x)), then x + feed-forward(norm(x)). Stacks of it run as one compiled loop."""

from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import GQA, Dense, ModelConfig, MoE
from deepseek_jax.kernels.attention import cudnn_gpu
from deepseek_jax.layers.cache import LayerCache
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.expert_parallel import Exchange
from deepseek_jax.layers.gqa import GQAttention
from deepseek_jax.layers.mla import MLAttention
from deepseek_jax.layers.mlp import SwiGLU
from deepseek_jax.layers.moe import MoELayer
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.types import Array, RouterStats

V3_SAVED = (
    "q", "k", "v", "c_q", "c_kv", "k_rope", "attention", "attention_lse", "block_attention",
    "block_ffn", "mtp_in", "router_logits", "ffn_gate", "ffn_up", "expert_in", "expert_gate", "expert_up", "expert_out",
)  # fmt: skip
"""What remat = "v3" keeps: all matrix products but MLA's up-projections. Norms, those and SwiGLU's product are redone."""

LATENT_EPS = 1e-6
"""Of the norms of MLA's latents: every published implementation leaves it at this, whatever rms_norm_eps says."""

_LAYER_IN = "layer_in_host"


class Block(nn.Module):
    """A decoder layer, `moe` or dense."""

    config: ModelConfig
    moe: bool

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None = None, recorded_BTX: Array | None = None
    ) -> tuple[Array, tuple[RouterStats | None, LayerCache | None]]:
        """[B, T, D] -> [B, T, D], the router's statistics of a MoE layer, and the cache with these tokens in it.

        `recorded_BTX`: experts that a MoE layer uses instead of its own choice, −1 where that stands.
        """
        c = self.config
        kwargs: dict[str, Any] = dict(param_dtype=c.param_dtype, stddev=c.initializer_range)
        if c.remat == "offload":
            x_BTD = checkpoint_name(x_BTD, _LAYER_IN)
        normed = RMSNorm(c.rms_norm_eps, c.param_dtype, name="attention_norm")(x_BTD)
        if isinstance(c.attention, GQA):
            attention = GQAttention(c.attention, c.rope, wide_sums=c.wide_sums, name="attention", **kwargs)
        else:
            attention = MLAttention(c.attention, c.rope, LATENT_EPS, wide_sums=c.wide_sums, name="attention", **kwargs)
        out_BTD, cache = attention(normed, context, cache)
        x_BTD = x_BTD + checkpoint_name(out_BTD, "block_attention")
        normed = RMSNorm(c.rms_norm_eps, c.param_dtype, name="ffn_norm")(x_BTD)
        if self.moe:
            assert isinstance(c.ffn, MoE)
            moe = MoELayer(c.ffn, exchange=Exchange.of(c), name="ffn", **kwargs)
            out_BTD, stats = moe(normed, context, recorded_BTX)
            return x_BTD + checkpoint_name(out_BTD, "block_ffn"), (stats, cache)
        width = c.ffn.intermediate_size if isinstance(c.ffn, Dense | MoE) else 0
        out_BTD = SwiGLU(width, wide_sums=c.wide_sums, name="ffn", **kwargs)(normed)
        return x_BTD + checkpoint_name(out_BTD, "block_ffn"), (None, cache)


def remat_policy(config: ModelConfig, *also: str) -> Any:
    """What the backward pass finds kept, by `config.remat`, and the values named in `also`.

    Integers of routing are kept always: they are few, and sorts are slow to run and slower to compile.
    """
    if config.remat == "none":
        # Slices of stacked weights are cheap to take again.
        return lambda primitive, *_, **__: primitive.name not in ("dynamic_slice", "squeeze")
    names = ("routing", *(V3_SAVED if config.remat == "v3" else ()), *also)
    if config.remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(names), names_which_can_be_offloaded=[_LAYER_IN],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    named = jax.checkpoint_policies.save_only_these_names(*names)
    if config.remat != "v3":
        return named
    # cuDNN's attention keeps its results unnamed: they are known by the primitive that makes them.
    return jax.checkpoint_policies.save_from_both_policies(
        named, lambda primitive, *_, **__: primitive.name == cudnn_gpu.PRIMITIVE
    )


def rematerialised(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
    """`module` with the backward pass's recomputation that `config.remat` asks for."""
    if config.remat == "none":
        return module
    # A scanned body cannot be merged with its recomputation by the compiler, so the costly barrier is left out.
    return nn.remat(module, policy=remat_policy(config), prevent_cse=not config.scan_layers)


def stacked(module: type[nn.Module], config: ModelConfig, length: int, in_axes: Any) -> type[nn.Module]:
    """`module` applied `length` times in a loop over stacked parameters; its first argument is the carry."""
    return nn.scan(
        rematerialised(module, config),
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=1 if config.scan_layers else length,
        metadata_params={meta.PARTITION_NAME: "layers"},
    )
