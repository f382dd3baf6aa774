"""SwiGLU feed-forward (Shazeer 2020): down(silu(gate(x)) ∘ up(x)). Dense layers and shared experts."""

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.layers.linear import linear
from deepseek_jax.layers.weights import for_product, weight
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array


def swiglu(x_BTD: Array, w_gate_DF: Array, w_up_DF: Array, w_down_FD: Array) -> Array:
    """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`; weights as `linear` takes them."""
    gate_BTF = shard(linear("btd,df->btf", x_BTD, w_gate_DF), "batch", "length", "act_ffn")
    up_BTF = shard(linear("btd,df->btf", x_BTD, w_up_DF), "batch", "length", "act_ffn")
    gate_BTF, up_BTF = checkpoint_name(gate_BTF, "ffn_gate"), checkpoint_name(up_BTF, "ffn_up")
    out_BTD = linear("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, w_down_FD)
    return shard(out_BTD, "batch", "length", "act_embed")


class SwiGLU(nn.Module):
    """SwiGLU feed-forward of width `intermediate_size`."""

    intermediate_size: int
    param_dtype: str
    stddev: float
    wide_sums: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        D, F = x_BTD.shape[-1], self.intermediate_size

        def param(name: str, shape: tuple[int, int], *axes: str) -> Array:
            stored = weight(self, name, shape, axes, dtype=self.param_dtype, stddev=self.stddev)
            return for_product(stored, x_BTD.dtype, self.wide_sums)

        w_gate, w_up = (param(name, (D, F), "embed", "ffn") for name in ("w_gate", "w_up"))
        return swiglu(x_BTD, w_gate, w_up, param("w_down", (F, D), "ffn", "embed"))
