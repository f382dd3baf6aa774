"""Grouped-query attention (Ainslie et al. 2023): LLM 7B (where it is multi-head), 67B, DeepSeekMoE, Coder, R1's students."""

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import GQA, Rope
from deepseek_jax.layers.cache import LayerCache, cached_attention, remembered
from deepseek_jax.layers.context import Context, attend
from deepseek_jax.layers.linear import add_bias, linear
from deepseek_jax.layers.rope import apply_rope, softmax_scale
from deepseek_jax.layers.weights import for_product, weight
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array


class GQAttention(nn.Module):
    """Projections, rotation of whole heads, causal attention, output projection."""

    config: GQA
    rope: Rope
    param_dtype: str
    stddev: float
    wide_sums: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`, and the cache with these tokens in it."""
        c, D, dtype = self.config, x_BTD.shape[-1], x_BTD.dtype

        def project(name: str, heads: int, axis: str) -> Array:
            w = weight(
                self, f"w_{name}", (D, heads, c.head_dim), ("embed", axis, "head_dim"),
                dtype=self.param_dtype, stddev=self.stddev,
            )  # fmt: skip
            out = linear("btd,dnh->btnh", x_BTD, for_product(w, dtype, self.wide_sums))
            if c.qkv_bias:
                shape, axes = (heads, c.head_dim), (axis, "head_dim")
                b = weight(self, f"b_{name}", shape, axes, dtype=self.param_dtype, constant=0.0)
                out = add_bias(out, for_product(b, dtype, self.wide_sums))
            return checkpoint_name(shard(out, "batch", "length", f"act_{axis}", "head_dim"), name)

        q_BTNH = project("q", c.num_attention_heads, "heads")
        k_BTKH = project("k", c.num_key_value_heads, "kv_heads")
        v_BTKH = project("v", c.num_key_value_heads, "kv_heads")
        q_BTNH = apply_rope(q_BTNH, context.cos, context.sin, interleaved=self.rope.interleaved)
        k_BTKH = apply_rope(k_BTKH, context.cos, context.sin, interleaved=self.rope.interleaved)
        scale = softmax_scale(c.head_dim, self.rope)
        own = None
        if cache is not None:
            assert context.positions is not None
            cache, own = remembered(cache, {"k": k_BTKH, "v": v_BTKH}, context.positions)
        if own is None or context.fresh:
            out_BTNH = attend(q_BTNH, k_BTKH, v_BTKH, context, scale)
        else:
            assert context.positions is not None
            out_BTNH = cached_attention(q_BTNH, own["k"], own["v"], context.positions, scale)
        w_o = weight(
            self, "w_o", (c.num_attention_heads, c.head_dim, D), ("heads", "head_dim", "embed"),
            dtype=self.param_dtype, stddev=self.stddev,
        )  # fmt: skip
        out_BTD = linear("btnh,nhd->btd", out_BTNH, for_product(w_o, dtype, self.wide_sums))
        return shard(out_BTD, "batch", "length", "act_embed"), cache
