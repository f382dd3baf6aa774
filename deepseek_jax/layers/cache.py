"""What attention keeps of the tokens before: keys and values (GQA), or the latent and the rotated key (MLA).

V2, section 2.1.4 and table 1: a token's MLA cache is C + R numbers a layer (512 + 64 = 576 in V2 and V3), where
multi-head attention keeps 2 · N · H.
"""

import jax.numpy as jnp

from deepseek_jax.config import GQA, MLA
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array

LayerCache = dict[str, Array]
"""GQA: `k` [B, S, K, H] and `v` [B, S, K, V]. MLA: `latent` [B, S, C + R], the normalised latent, then the rotated key."""


def cache_shapes(attention: GQA | MLA, batch: int, length: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> shape and logical axes of one layer's cache."""
    if isinstance(attention, GQA):
        shape = (batch, length, attention.num_key_value_heads, attention.head_dim)
        names = ("batch", "length", "act_kv_heads", "head_dim")
        return {"k": (shape, names), "v": (shape, names)}
    width = attention.kv_lora_rank + attention.qk_rope_head_dim
    return {"latent": ((batch, length, width), ("batch", "length", "none"))}


def written(cache_BS: Array, new_BT: Array, positions_BT: Array) -> Array:
    """The cache with rows [b, positions[b, t]] replaced; places past the end are dropped, as padding has them."""
    rows = jnp.arange(cache_BS.shape[0])[:, None]
    return cache_BS.at[rows, positions_BT].set(new_BT.astype(cache_BS.dtype), mode="drop")


def cached_attention(q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, positions_BT: Array, scale: float) -> Array:
    """softmax(scale · q kᵀ) v over the cache: a query at place i sees the keys 0 … i. [B, T, N, V].

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BSKH: all keys of the cache.
        v_BSKV: all values.
        positions_BT: places of the queries.
        scale: multiplies the scores.
    """
    (B, T, N, H), K = q_BTNH.shape, k_BSKH.shape[2]
    wide = at_least_float32(q_BTNH.dtype)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=wide) * scale
    seen_BTS = jnp.arange(k_BSKH.shape[1]) <= positions_BT[..., None]
    scores = jnp.where(seen_BTS[:, None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bkgts,bskv->btkgv", weights.astype(v_BSKV.dtype), v_BSKV, preferred_element_type=wide)
    out = out.reshape(B, T, N, v_BSKV.shape[-1]).astype(v_BSKV.dtype)
    return shard(out, "batch", "length", "act_heads", "head_dim")
