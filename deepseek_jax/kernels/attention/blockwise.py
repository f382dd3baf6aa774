"""Blockwise attention with an online softmax, in plain JAX: no [T, S] score matrix, forward or backward.

Forward, for a block of queries, walks the key blocks that the causal mask leaves and keeps the running maximum, sum and
output (Milakov & Gimelshein 2018; Dao et al. 2022). Backward recomputes each block of probabilities from the saved
log-sum-exp: dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import platform
from deepseek_jax.kernels.attention.reference import Masks
from deepseek_jax.types import Array


class _Setting(NamedTuple):
    """What is static: scale, mask kind and block sizes."""

    scale: float
    causal: bool
    block_q: int
    block_k: int


def blockwise(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
    block_q: int | None = None,
    block_k: int | None = None,
) -> Array:
    """See `kernels.attention.attention`; `block_q` and `block_k` bound the largest piece of the score matrix.

    By default 128 on a CPU, where a block then stays in its cache and more of the causal half is skipped, else 512.
    """
    T, N = q_BTNH.shape[1:3]
    masks = Masks(scale, q_segment_ids, kv_segment_ids, causal)
    setting, *arrays = _prepared(q_BTNH, k_BSKH, v_BSKV, masks, block_q, block_k)
    out: Any = _attend(setting, *arrays)
    return out[:, :T].reshape(*out.shape[:1], T, N, -1)


def block_forward(q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, masks: Masks) -> tuple[Array, Array]:
    """See `kernels.attention.blocks.forward`."""
    B, T, N, _ = q_BTNH.shape
    setting, q, k, v, segments = _prepared(q_BTNH, k_BSKH, v_BSKV, masks)
    out, lse = _forward(setting, q, k, v, segments, jnp.promote_types(q.dtype, jnp.float32))
    return out[:, :T].reshape(B, T, N, -1), lse.reshape(B, N, -1)[:, :, :T]


def block_backward(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, out_BTNV: Array, lse_BNT: Array, d_out_BTNV: Array, masks: Masks
) -> tuple[Array, Array, Array]:
    """See `kernels.attention.blocks.backward`."""
    T, S, K = q_BTNH.shape[1], *k_BSKH.shape[1:3]
    setting, q, k, v, segments = _prepared(q_BTNH, k_BSKH, v_BSKV, masks)
    out, d_out = (_pad(x, q.shape[1] - T).reshape(*q.shape[:4], -1) for x in (out_BTNV, d_out_BTNV))
    lse = jnp.pad(lse_BNT, ((0, 0), (0, 0), (0, q.shape[1] - T))).reshape(*lse_BNT.shape[:1], K, -1, q.shape[1])
    dq, dk, dv = _gradients(setting, q, k, v, segments, out, lse, d_out, lse.dtype)
    return dq[:, :T].reshape(q_BTNH.shape), dk[:, :S], dv[:, :S]


def _prepared(
    q: Array, k: Array, v: Array, masks: Masks, block_q: int | None = None, block_k: int | None = None
) -> tuple[_Setting, Array, Array, Array, tuple[Array, Array] | None]:
    """Lengths filled up to whole blocks, query heads in groups by the key/value head that they share."""
    default = 128 if platform.target() == "cpu" else 512
    scale, q_segment_ids, kv_segment_ids, causal = masks
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    block_q, block_k = min(block_q or default, T), min(block_k or default, S)
    pad_q, pad_k = -T % block_q, -S % block_k
    # Added keys are marked as padding by segment 0, so a mask by segments is there whenever keys were added.
    if q_segment_ids is None and pad_k and not causal:
        q_segment_ids, kv_segment_ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    segments = None
    if q_segment_ids is not None and kv_segment_ids is not None:
        segments = (_pad(q_segment_ids, pad_q), _pad(kv_segment_ids, pad_k))
    q = _pad(q, pad_q).reshape(B, T + pad_q, K, N // K, H)
    return _Setting(scale, causal, block_q, block_k), q, _pad(k, pad_k), _pad(v, pad_k), segments


def _pad(x: Array, rows: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, rows)] + [(0, 0)] * (x.ndim - 2)) if rows else x


def _rows(x: Array, index: Array | int, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _scores(setting: _Setting, q: Array, k: Array, segments: tuple[Array, Array] | None, i: Array, j: Array) -> Array:
    """Masked scores [B, K, G, block_q, block_k] of query block i and key block j; −inf where masked."""
    acc = jnp.promote_types(q.dtype, jnp.float32)
    scores = setting.scale * jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=acc)
    mask = None
    if setting.causal:
        rows = i * setting.block_q + jnp.arange(setting.block_q)
        columns = j * setting.block_k + jnp.arange(setting.block_k)
        mask = (rows[:, None] >= columns[None, :])[None]
    if segments is not None:
        q_ids = _rows(segments[0], i, setting.block_q)[:, :, None]
        kv_ids = _rows(segments[1], j, setting.block_k)[:, None, :]
        same = (q_ids == kv_ids) & (kv_ids != 0)
        mask = same if mask is None else mask & same
    return scores if mask is None else jnp.where(mask[:, None, None], scores, -jnp.inf)


def _key_blocks(setting: _Setting, i: Array, total: int) -> Array | int:
    """Number of key blocks that query block i sees."""
    if not setting.causal:
        return total
    return jnp.minimum(total, ((i + 1) * setting.block_q + setting.block_k - 1) // setting.block_k)


def _forward(
    setting: _Setting, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None, dtype: Any
) -> tuple[Array, Array]:
    """Output [B, T, K, G, V] in `dtype` and log-sum-exp [B, K, G, T] (0 and −inf for a row that sees nothing)."""
    B, T, K, G, _ = q.shape
    acc = jnp.promote_types(q.dtype, jnp.float32)
    total = k.shape[1] // setting.block_k

    def query_block(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        q_i = _rows(q, i, setting.block_q)

        def key_block(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, sums, out = state
            scores = _scores(setting, q_i, _rows(k, j, setting.block_k), segments, i, j)
            new = jnp.maximum(highest, scores.max(axis=-1))
            finite = jnp.where(jnp.isneginf(new), 0, new)
            weights = jnp.exp(scores - finite[..., None])
            shrink = jnp.exp(highest - finite)
            v_j = _rows(v, j, setting.block_k)
            part = jnp.einsum("bkgts,bskv->bkgtv", weights.astype(v.dtype), v_j, preferred_element_type=acc)
            return new, sums * shrink + weights.sum(axis=-1), out * shrink[..., None] + part

        shape = (B, K, G, setting.block_q)
        start = (jnp.full(shape, -jnp.inf, acc), jnp.zeros(shape, acc), jnp.zeros((*shape, v.shape[-1]), acc))
        highest, sums, out = lax.fori_loop(0, _key_blocks(setting, i, total), key_block, start)
        seen = sums > 0
        out = jnp.where(seen[..., None], out / jnp.where(seen, sums, 1)[..., None], 0)
        lse = jnp.where(seen, jnp.where(seen, highest, 0) + jnp.log(jnp.where(seen, sums, 1)), -jnp.inf)
        return None, (out.astype(dtype), lse)

    if T == setting.block_q:
        _, (out, lse) = query_block(None, jnp.asarray(0))
        return out.transpose(0, 3, 1, 2, 4), lse
    _, (out, lse) = lax.scan(query_block, None, jnp.arange(T // setting.block_q))
    # [blocks, B, K, G, block_q, V] -> [B, T, K, G, V], and the log-sum-exp to [B, K, G, T]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, K, G, -1)
    return out, lse.transpose(1, 2, 3, 0, 4).reshape(B, K, G, T)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setting: _Setting, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None) -> Array:
    return _forward(setting, q, k, v, segments, v.dtype)[0]


def _attend_fwd(setting: _Setting, q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None):
    out, lse = _forward(setting, q, k, v, segments, v.dtype)
    lse = jnp.where(jnp.isneginf(lse), 0, lse)  # exp(−inf − 0) is 0, as it should be
    # Named, so that a layer that recomputes its projections in the backward pass need not recompute attention.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _attend_bwd(setting: _Setting, residuals, d_out: Array):
    q, k, v, segments, out, lse = residuals
    dq, dk, dv = _gradients(setting, q, k, v, segments, out, lse, d_out, q.dtype)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


def _gradients(
    setting: _Setting,
    q: Array,
    k: Array,
    v: Array,
    segments: tuple[Array, Array] | None,
    out: Array,
    lse: Array,
    d_out: Array,
    dq_dtype: Any,
) -> tuple[Array, Array, Array]:
    """dq in `dq_dtype`, dk and dv in the dtype of `lse`. Of keys that are a part of those behind `out` and `lse`, too."""
    T, acc = q.shape[1], lse.dtype
    total = k.shape[1] // setting.block_k
    delta = jnp.einsum("btkgv,btkgv->bkgt", d_out.astype(acc), out.astype(acc))

    def query_block(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_i, d_i = _rows(q, i, setting.block_q), _rows(d_out, i, setting.block_q)
        lse_i = lax.dynamic_slice_in_dim(lse, i * setting.block_q, setting.block_q, axis=3)
        delta_i = lax.dynamic_slice_in_dim(delta, i * setting.block_q, setting.block_q, axis=3)

        def key_block(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq_i, dk, dv = state
            k_j, v_j = _rows(k, j, setting.block_k), _rows(v, j, setting.block_k)
            weights = jnp.exp(_scores(setting, q_i, k_j, segments, i, j) - lse_i[..., None])
            d_weights = jnp.einsum("btkgv,bskv->bkgts", d_i, v_j, preferred_element_type=acc)
            d_scores = (setting.scale * weights * (d_weights - delta_i[..., None])).astype(q.dtype)
            dq_i += jnp.einsum("bkgts,bskh->btkgh", d_scores, k_j, preferred_element_type=acc)
            dk_j = jnp.einsum("bkgts,btkgh->bskh", d_scores, q_i, preferred_element_type=acc)
            dv_j = jnp.einsum("bkgts,btkgv->bskv", weights.astype(v.dtype), d_i, preferred_element_type=acc)
            return dq_i, _add_rows(dk, dk_j, j, setting.block_k), _add_rows(dv, dv_j, j, setting.block_k)

        start = (jnp.zeros(q_i.shape, acc), *carry)
        dq_i, dk, dv = lax.fori_loop(0, _key_blocks(setting, i, total), key_block, start)
        return (dk, dv), dq_i.astype(dq_dtype)

    start = (jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc))
    if T == setting.block_q:
        (dk, dv), dq = query_block(start, jnp.asarray(0))
    else:
        (dk, dv), blocks = lax.scan(query_block, start, jnp.arange(T // setting.block_q))
        dq = jnp.moveaxis(blocks, 0, 1).reshape(q.shape)
    return dq, dk, dv


def _add_rows(x: Array, part: Array, index: Array, size: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, _rows(x, index, size) + part, index * size, axis=1)


_attend.defvjp(_attend_fwd, _attend_bwd)
