"""Softmax attention: one function, several routes.

Routes: `reference` (whole score matrix, the meaning), `blockwise` (online softmax in plain JAX, any device, the
default), `splash` (Pallas, TPU), `cudnn` (GPU).
"""

from typing import Any, Literal

from deepseek_jax import platform
from deepseek_jax.kernels.attention.blockwise import blockwise
from deepseek_jax.kernels.attention.reference import attention_reference
from deepseek_jax.types import Array

Implementation = Literal["reference", "blockwise", "splash", "cudnn"]
_FASTEST: dict[platform.Platform, Implementation] = {"tpu": "splash", "gpu": "cudnn", "cpu": "blockwise"}


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
    implementation: Implementation | None = None,
) -> Array:
    """softmax(scale · q kᵀ + mask) v, head by head.

    Args:
        q_BTNH: queries; N is a multiple of K, and query heads n·N/K … share key/value head n.
        k_BSKH: keys.
        v_BSKV: values; their head dim may differ from the keys'.
        scale: multiplies the scores.
        q_segment_ids: int32 [B, T]; a query sees the keys of its own segment. 0 is padding: sees nothing, is seen by
            nothing, and its rows are zero.
        kv_segment_ids: int32 [B, S], given exactly when `q_segment_ids` is.
        causal: query i sees keys 0 … i (by index; T = S).
        implementation: a route by name; None takes the fastest that supports the arguments.

    Returns:
        [B, T, N, V] in the dtype of `v_BSKV`. Softmax and its sums are float32 or wider.

    Raises:
        ValueError: shapes that do not fit, or a named route that does not support the arguments.
    """
    _check(q_BTNH, k_BSKH, v_BSKV, q_segment_ids, kv_segment_ids, causal)
    kwargs: dict[str, Any] = dict(
        scale=scale, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids, causal=causal
    )
    if implementation is None:
        implementation = _FASTEST[platform.target()]
        strict = False
    else:
        strict = True
    if implementation == "reference":
        return attention_reference(q_BTNH, k_BSKH, v_BSKV, **kwargs)
    if implementation == "splash":
        from deepseek_jax.kernels.attention import splash_tpu as route

        function = route.splash
    elif implementation == "cudnn":
        from deepseek_jax.kernels.attention import cudnn_gpu as route

        function = route.cudnn
    else:
        return blockwise(q_BTNH, k_BSKH, v_BSKV, **kwargs)
    reason = route.supports(q_BTNH, k_BSKH, v_BSKV, **kwargs)
    if reason is None:
        return function(q_BTNH, k_BSKH, v_BSKV, **kwargs)
    if strict:
        raise ValueError(f"attention: implementation={implementation!r} does not serve this call: {reason}")
    return blockwise(q_BTNH, k_BSKH, v_BSKV, **kwargs)


def _check(q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, causal: bool) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: {shapes} are not [B,T,N,H], [B,S,K,H], [B,S,K,V]")
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {shapes}: head dims of q and k must agree and K must divide N")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"attention: {shapes}: causal attention by index needs T = S")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("attention: give both q_segment_ids and kv_segment_ids, or neither")
    if q_segments is not None and kv_segments is not None:
        if q_segments.shape != q.shape[:2] or kv_segments.shape != k.shape[:2]:
            raise ValueError(f"attention: segment ids {q_segments.shape}, {kv_segments.shape} do not fit {shapes}")


__all__ = ["Implementation", "attention", "attention_reference", "blockwise"]
