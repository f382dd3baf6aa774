"""What attention keeps of the tokens before: keys and values (GQA), or the latent and the rotated key (MLA).

V2, section 2.1.4 and table 1: a token's MLA cache is C + R numbers a layer (512 + 64 = 576 in V2 and V3), where
multi-head attention keeps 2 · N · H.
"""

import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import GQA, MLA
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.parallel.rules import shard
from deepseek_jax.types import Array

LayerCache = dict[str, Array]
"""GQA: `k` [B, K, S, H] and `v` [B, K, S, V]. MLA: `latent` [B, 1, S, C + R], the normalised latent, then the rotated
key. Places follow heads, so that the rows that one head reads lie together.

Where layers run in a loop: all of its layers' in one array, [B, L, …], and `layer`, int32 [], the one at work."""

_TILE = 128
_MOST_SCORES = 2**28  # numbers of the score matrix that exist at once


def cache_shapes(
    attention: GQA | MLA, batch: int, length: int, *, tiled: bool = False
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> shape and logical axes of one layer's cache.

    `tiled`: MLA's rows filled up to whole tiles of 128 numbers, as a TPU's memory holds them anyway. Of another width, the
    compiler lays caches out in one order between programs and in another inside, and copies them whole, in and out.
    """
    if isinstance(attention, GQA):
        shape = (batch, attention.num_key_value_heads, length, attention.head_dim)
        names = ("batch", "act_kv_heads", "length", "head_dim")
        return {"k": (shape, names), "v": (shape, names)}
    width = attention.kv_lora_rank + attention.qk_rope_head_dim
    if tiled:
        width += -width % _TILE
    return {"latent": ((batch, 1, length, width), ("batch", "none", "length", "none"))}


def remembered(cache: LayerCache, new: dict[str, Array], positions_BT: Array) -> tuple[LayerCache, dict[str, Array]]:
    """The cache with places [b, :, positions[b, t]] of a layer replaced, and what that layer has, each [B, K, S, H].

    Args:
        cache: of the layer, or of all layers in a loop.
        new: name -> [B, T, K, H].
        positions_BT: int32; places past the end are dropped, as padding has them.
    """
    layer = cache.get("layer")
    rows = jnp.arange(len(positions_BT))[:, None]
    at = (rows, slice(None), positions_BT) if layer is None else (rows, layer, slice(None), positions_BT)
    written = {name: cache[name].at[at].set(x.astype(cache[name].dtype), mode="drop") for name, x in new.items()}
    if layer is None:
        return written, written
    own = {name: lax.dynamic_index_in_dim(x, layer, axis=1, keepdims=False) for name, x in written.items()}
    return cache | written, own


def cached_attention(q_BTNH: Array, k_BKSH: Array, v_BKSV: Array, positions_BT: Array, scale: float) -> Array:
    """softmax(scale · q kᵀ) v over the cache: a query at place i sees the keys 0 … i. [B, T, N, V].

    Args:
        q_BTNH: queries; N is a multiple of K.
        k_BKSH: all keys of the cache.
        v_BKSV: all values.
        positions_BT: places of the queries.
        scale: multiplies the scores.
    """
    (B, T, N, H), (_, K, S, V) = q_BTNH.shape, v_BKSV.shape
    wide = at_least_float32(q_BTNH.dtype)

    def some(q_BtKGH: Array, positions_Bt: Array) -> Array:
        scores = jnp.einsum("btkgh,bksh->bkgts", q_BtKGH, k_BKSH, preferred_element_type=wide) * scale
        seen_BtS = jnp.arange(S) <= positions_Bt[..., None]
        scores = jnp.where(seen_BtS[:, None, None], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        # Divided by the sum at the end, where there is less to divide.
        out = jnp.einsum("bkgts,bksv->btkgv", weights.astype(v_BKSV.dtype), v_BKSV, preferred_element_type=wide)
        return out / jnp.moveaxis(weights.sum(axis=-1), 3, 1)[..., None]

    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    pieces = 1
    while T % (2 * pieces) == 0 and B * N * (T // pieces) * S > _MOST_SCORES:
        pieces *= 2
    if pieces == 1:
        out = some(q_BTKGH, positions_BT)
    else:  # a chunk of a long prompt: a piece of its queries at a time
        split = (q_BTKGH.reshape(B, pieces, -1, K, N // K, H), positions_BT.reshape(B, pieces, -1))
        out = lax.map(lambda part: some(*part), tuple(jnp.moveaxis(x, 1, 0) for x in split))
        out = jnp.moveaxis(out, 0, 1)
    out = out.reshape(B, T, N, V).astype(v_BKSV.dtype)
    return shard(out, "batch", "length", "act_heads", "head_dim")
