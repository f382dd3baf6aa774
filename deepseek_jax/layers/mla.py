"""Multi-head latent attention (V2, section 2.1 and appendix C), in the expanded and the absorbed form.

Letters of the papers: c_q and c_kv are the latents, W^DQ W^UQ W^DKV W^UK W^UV W^KR W^O the projections. `w_uq` holds
W^UQ and W^QR side by side, per head: first the dims without rope, then the rotated ones.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import MLA, Rope
from deepseek_jax.layers.cache import LayerCache, cached_attention, remembered
from deepseek_jax.layers.context import Context, attend_latent
from deepseek_jax.layers.linear import linear
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.rope import apply_rope, softmax_scale
from deepseek_jax.layers.weights import for_product, weight
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array

_HEADS = ("batch", "length", "act_heads", "head_dim")


def mla_expanded(
    q_nope_BTNP: Array,
    q_rope_BTNR: Array,
    c_kv_BTC: Array,
    k_rope_BTR: Array,
    w_uk_CNP: Array,
    w_uv_CNV: Array,
    context: Context,
    scale: float,
) -> Array:
    """Keys and values of every head are written out (V2 eq. 42–46). For training and prefill: [B, T, N, V].

    Args:
        q_nope_BTNP: queries, dims without rope.
        q_rope_BTNR: queries, rotated dims.
        c_kv_BTC: normalised key/value latent.
        k_rope_BTR: rotated key, shared by all heads.
        w_uk_CNP: W^UK, as `linear` takes it.
        w_uv_CNV: W^UV, as `linear` takes it.
        context: masks of the forward pass.
        scale: softmax scale, (P + R)^-0.5 and YaRN's m².
    """
    q = jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1)
    return attend_latent(q, c_kv_BTC, k_rope_BTR, (w_uk_CNP, w_uv_CNV), _heads, context, scale)


def _heads(c_kv_BTC: Array, k_rope_BTR: Array, w_uk_CNP: Array, w_uv_CNV: Array) -> tuple[Array, Array]:
    """Keys [B, T, N, P + R] and values [B, T, N, V] of the heads that the weights have."""
    k_nope_BTNP = linear("btc,cnp->btnp", c_kv_BTC, w_uk_CNP)
    k_rope_BTNR = jnp.broadcast_to(k_rope_BTR[:, :, None], (*k_nope_BTNP.shape[:3], k_rope_BTR.shape[-1]))
    v_BTNV = linear("btc,cnv->btnv", c_kv_BTC, w_uv_CNV)
    return jnp.concatenate([k_nope_BTNP, k_rope_BTNR], axis=-1), v_BTNV


def _latent(c_kv_BTC: Array, k_rope_BTR: Array) -> tuple[Array, Array]:
    """The one key [B, T, 1, C + R] and value [B, T, 1, C] of the absorbed form."""
    return jnp.concatenate([c_kv_BTC, k_rope_BTR], axis=-1)[:, :, None], c_kv_BTC[:, :, None]


def mla_absorbed(
    q_nope_BTNP: Array,
    q_rope_BTNR: Array,
    c_kv_BTC: Array,
    k_rope_BTR: Array,
    w_uk_CNP: Array,
    w_uv_CNV: Array,
    context: Context,
    scale: float,
    latent_B1SL: Array | None = None,
) -> Array:
    """W^UK absorbed into the queries and W^UV into the output (V2, end of section 2.1.2). Same arguments and result.

    All heads attend to one key [c_kv ; k_rope] of C + R dims and one value c_kv: the form for decoding, where only
    these C + R numbers a token are kept. `latent_B1SL` is such a cache, the new tokens in it; without one, the new tokens
    see one another.
    """
    q_latent_BTNC = shard(linear("btnp,cnp->btnc", q_nope_BTNP, w_uk_CNP), *_HEADS)
    q = jnp.concatenate([q_latent_BTNC, q_rope_BTNR], axis=-1)
    if latent_B1SL is None:
        out_BTNC = attend_latent(q, c_kv_BTC, k_rope_BTR, (), _latent, context, scale)
    else:
        assert context.positions is not None
        q = _widened(q, latent_B1SL.shape[-1])
        # The rotated key is weighted along with the latent and cut off: cheaper than values cut out of the cache.
        out_BTNC = cached_attention(q, latent_B1SL, latent_B1SL, context.positions, scale)[..., : c_kv_BTC.shape[-1]]
    return shard(linear("btnc,cnv->btnv", out_BTNC, w_uv_CNV), *_HEADS)


def _widened(x: Array, width: int) -> Array:
    """With zeros at the end of the last dim, up to the width of a cache's rows."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


class MLAttention(nn.Module):
    """Down-projections to the latents, their norms, up-projections, attention, output projection."""

    config: MLA
    rope: Rope
    eps: float
    param_dtype: str
    stddev: float
    absorbed: bool = False
    wide_sums: bool = False

    @nn.compact
    def __call__(
        self, x_BTD: Array, context: Context, cache: LayerCache | None = None
    ) -> tuple[Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D] in the dtype of `x_BTD`, and the cache with these tokens in it."""
        c, D, dtype = self.config, x_BTD.shape[-1], x_BTD.dtype
        N, C, P, R, V = (
            c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        )  # fmt: skip

        def param(name: str, shape: tuple[int, ...], *axes: str) -> Array:
            stored = weight(self, name, shape, axes, dtype=self.param_dtype, stddev=self.stddev)
            return for_product(stored, dtype, self.wide_sums)

        def latent(x: Array, name: str) -> Array:
            # The down-projection is what V3's recomputation keeps; norm and up-projection are done again (section 3.2.3).
            return checkpoint_name(shard(x, "batch", "length", "none"), name)

        if c.q_lora_rank is None:
            q_BTNH = linear("btd,dnh->btnh", x_BTD, param("w_q", (D, N, P + R), "embed", "heads", "head_dim"))
            q_BTNH = checkpoint_name(q_BTNH, "q")
        else:
            Q = c.q_lora_rank
            c_q_BTQ = latent(linear("btd,dq->btq", x_BTD, param("w_dq", (D, Q), "embed", "latent_out")), "c_q")
            c_q_BTQ = RMSNorm(self.eps, self.param_dtype, name="q_norm")(c_q_BTQ)
            q_BTNH = linear("btq,qnh->btnh", c_q_BTQ, param("w_uq", (Q, N, P + R), "latent", "heads", "head_dim"))
        q_nope, q_rope = jnp.split(shard(q_BTNH, *_HEADS), [P], axis=-1)

        c_kv_BTC = latent(linear("btd,dc->btc", x_BTD, param("w_dkv", (D, C), "embed", "latent_out")), "c_kv")
        c_kv_BTC = RMSNorm(self.eps, self.param_dtype, name="kv_norm")(c_kv_BTC)
        k_rope_BTR = latent(linear("btd,dr->btr", x_BTD, param("w_kr", (D, R), "embed", "latent_out")), "k_rope")

        q_rope = apply_rope(q_rope, context.cos, context.sin, interleaved=self.rope.interleaved)
        k_rope_BTR = apply_rope(
            k_rope_BTR[:, :, None], context.cos, context.sin, interleaved=self.rope.interleaved
        )[:, :, 0]  # fmt: skip
        w_uk = param("w_uk", (C, N, P), "latent", "heads", "head_dim")
        w_uv = param("w_uv", (C, N, V), "latent", "heads", "head_dim")
        parts = (q_nope, q_rope, c_kv_BTC, k_rope_BTR, w_uk, w_uv, context, softmax_scale(P + R, self.rope))
        own = None
        if cache is not None:
            assert context.positions is not None
            new_BT1L = jnp.concatenate([c_kv_BTC, k_rope_BTR], axis=-1)[:, :, None]
            new_BT1L = _widened(new_BT1L, cache["latent"].shape[-1])
            cache, own = remembered(cache, {"latent": new_BT1L}, context.positions)
        if own is not None and not context.fresh:
            out_BTNV = mla_absorbed(*parts, latent_B1SL=own["latent"])
        else:
            out_BTNV = (mla_absorbed if self.absorbed else mla_expanded)(*parts)
        w_o = param("w_o", (N, V, D), "heads", "head_dim", "embed")
        return shard(linear("btnv,nvd->btd", out_BTNV, w_o), "batch", "length", "act_embed"), cache
