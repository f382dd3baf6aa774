"""Attention to a part of the keys, for a caller that joins the parts (ring attention).

A softmax over all keys is the mean of the softmaxes over parts, weighted by exp(log-sum-exp). Backward needs no more of a
part than the joined output and log-sum-exp: P = exp(S − lse) are then the whole softmax's probabilities of these keys.
"""

from collections.abc import Callable
from typing import Any

from deepseek_jax import platform
from deepseek_jax.kernels.attention.blockwise import block_backward, block_forward
from deepseek_jax.kernels.attention.reference import Masks
from deepseek_jax.types import Array


def forward(q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, **masks: Any) -> tuple[Array, Array]:
    """Attention to these keys alone, and how much they weigh.

    Args:
        q_BTNH, k_BSKH, v_BSKV: as in `kernels.attention.attention`.
        **masks: `scale`, `q_segment_ids`, `kv_segment_ids`, `causal` as there.

    Returns:
        [B, T, N, V] and the log-sum-exp of the scores [B, N, T], both float32 or wider. A row that sees no key has 0 and
        −inf, or values that a log-sum-exp of the lowest numbers weighs as nothing.
    """
    given = Masks(**masks)
    run, _ = _route(q_BTNH, k_BSKH, v_BSKV, given)
    return run(q_BTNH, k_BSKH, v_BSKV, given)


def backward(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, out_BTNV: Array, lse_BNT: Array, d_out_BTNV: Array, **masks: Any
) -> tuple[Array, Array, Array]:
    """Gradients by q, k and v of a part, float32 or wider.

    Args:
        q_BTNH, k_BSKH, v_BSKV, **masks: as in `forward`.
        out_BTNV: the joined output.
        lse_BNT: the joined log-sum-exp; finite.
        d_out_BTNV: gradient by the joined output.
    """
    given = Masks(**masks)
    _, run = _route(q_BTNH, k_BSKH, v_BSKV, given)
    return run(q_BTNH, k_BSKH, v_BSKV, out_BTNV, lse_BNT, d_out_BTNV, given)


def _route(q: Array, k: Array, v: Array, masks: Masks) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward of the TPU's route where it serves these arguments, else of the plain one."""
    if platform.target() == "tpu":
        from deepseek_jax.kernels.attention import splash_tpu

        # Other ids for keys than for queries are no hindrance here: who joins the parts weighs a row without keys as nothing.
        if splash_tpu.supports(q, k, v, scale=masks.scale, causal=masks.causal) is None:
            return splash_tpu.block_forward, splash_tpu.block_backward
    return block_forward, block_backward
