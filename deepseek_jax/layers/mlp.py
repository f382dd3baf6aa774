"""SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) ∘ up(x)). Dense layers and shared experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.layers.weights import weight
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array


def swiglu(x_BTD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array) -> Array:
    """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`; weights are cast to it."""
    dtype = x_BTD.dtype
    gate_BTF = shard(jnp.einsum("btd,df->btf", x_BTD, w_gate_DF.astype(dtype)), "batch", "length", "act_ffn")
    up_BTF = shard(jnp.einsum("btd,df->btf", x_BTD, w_up_DF.astype(dtype)), "batch", "length", "act_ffn")
    gate_BTF, up_BTF = checkpoint_name(gate_BTF, "ffn_gate"), checkpoint_name(up_BTF, "ffn_up")
    out_BTD = jnp.einsum("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, w_down_FD.astype(dtype))
    return shard(out_BTD, "batch", "length", "act_embed")


class SwiGLU(nn.Module):
    """SwiGLU feed-forward of width `intermediate_size`."""

    intermediate_size: int
    param_dtype: str
    stddev: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        D, F = x_BTD.shape[-1], self.intermediate_size
        kwargs: dict[str, Any] = dict(dtype=self.param_dtype, stddev=self.stddev)
        w_gate = weight(self, "w_gate", (D, F), ("embed", "ffn"), **kwargs)
        w_up = weight(self, "w_up", (D, F), ("embed", "ffn"), **kwargs)
        w_down = weight(self, "w_down", (F, D), ("ffn", "embed"), **kwargs)
        return swiglu(x_BTD, w_gate, w_up, w_down)
