"""The meaning of `attention`: the whole score matrix at once. For tests and small shapes."""

from typing import NamedTuple

import jax.numpy as jnp

from deepseek_jax.types import Array


class Masks(NamedTuple):
    """What `attention` is told besides queries, keys and values; see there."""

    scale: float
    q_segment_ids: Array | None = None
    kv_segment_ids: Array | None = None
    causal: bool = True


def attention_reference(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
) -> Array:
    """See `kernels.attention.attention`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    acc = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=acc)
    mask = jnp.ones((B, T, S), bool)
    if causal:
        mask &= jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
    if q_segment_ids is not None and kv_segment_ids is not None:
        mask &= (q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]) & (kv_segment_ids[:, None, :] != 0)
    mask = mask[:, None, None]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=jnp.finfo(acc).min)
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - highest, 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bskv->btkgv", weights.astype(v_BSKV.dtype), v_BSKV, preferred_element_type=acc)
    return out.reshape(B, T, N, -1).astype(v_BSKV.dtype)
