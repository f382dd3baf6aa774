"""Attention on TPU by splash attention, the Pallas kernel that ships inside jax.

Source: `jax.experimental.pallas.ops.tpu.splash_attention` (block-sparse flash attention; Dao et al. 2022). It takes one
sequence [N, T, H], query heads that share a key/value head read it in place, and values may have another head dim than
keys, so MLA's 192/128 needs no padding. What is added here: batch by vmap, the softmax scale folded into the queries,
rows of padding set to zero, and block sizes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from deepseek_jax.kernels.attention.reference import Masks
from deepseek_jax.types import Array

LANES = 128
# Largest tiles that stay in the 16 MiB of VMEM which the TPU compiler grants a kernel unless told otherwise, with heads
# of 192/128 in bfloat16 (v5e and v5p; key blocks of 2048 do not). Float32 gets half.
BLOCK_Q, BLOCK_KV, BLOCK_KV_COMPUTE = 512, 1024, 512
# The fused backward writes one partial dq per key block and sums them after: it saves two of seven products, for this
# many copies of q at most.
MAX_DQ_COPIES = 4


def supports(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
) -> str | None:
    """None where `splash` serves these arguments, else the reason why not. Looks at shapes and dtypes only."""
    del scale, causal
    T, N, H = q_BTNH.shape[1:]
    S, K, V = v_BSKV.shape[1:]
    dtypes = {x.dtype.name for x in (q_BTNH, k_BSKH, v_BSKV)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        return f"splash takes q, k, v of one dtype, bfloat16 or float32, not {sorted(dtypes)}"
    if T % LANES or S % LANES:
        return f"splash takes lengths that are multiples of {LANES}, not T={T}, S={S}"
    if N % K:
        return f"splash takes query heads in equal groups, not N={N} over K={K}"
    if H % 8 or V % 8 or max(H, V) > 256:
        return f"splash takes head dims that are multiples of 8 up to 256, not {H} and {V}"
    if q_segment_ids is not kv_segment_ids:
        # A row that sees no key would come out as the mean of the values. With one array for both sides every row sees
        # itself (padding sees padding and is zeroed after).
        return "splash takes segment ids only where queries and keys share one array"
    if q_segment_ids is not None and T != S:
        return f"splash takes segment ids only with T = S, not T={T}, S={S}"
    return None


def splash(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
    interpret: bool = False,
) -> Array:
    """See `kernels.attention.attention`; call it only where `supports` is None.

    The scale is multiplied into the queries in their dtype: one more rounding of q. Output and log-sum-exp carry the
    checkpoint name "attention".

    Args:
        q_BTNH, k_BSKH, v_BSKV, scale, q_segment_ids, kv_segment_ids, causal: as there.
        interpret: run the kernel in the Pallas interpreter, on any device (tests).

    Returns:
        [B, T, N, V] in the dtype of `v_BSKV`.
    """
    attend = _kernel(q_BTNH, k_BSKH, causal, residual_checkpoint_name="attention", interpret=interpret)
    q = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).swapaxes(1, 2)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKV.swapaxes(1, 2)
    out = jax.vmap(attend)(q, k, v, *_ids(q_segment_ids, kv_segment_ids)).swapaxes(1, 2)
    if q_segment_ids is None:
        return out
    # Padding attended to padding, which is finite; zeroing it here also stops its gradient.
    return jnp.where((q_segment_ids != 0)[:, :, None, None], out, 0)


def block_forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, given: Masks, *, interpret: bool = False
) -> tuple[Array, Array]:
    """See `kernels.attention.blocks.forward`. Each part's output is rounded to the dtype of the queries."""
    attend = _kernel(q_BTNH, k_BSKH, given.causal, save_residuals=True, interpret=interpret)
    q = q_BTNH * jnp.asarray(given.scale, q_BTNH.dtype)
    arrays = (x.swapaxes(1, 2) for x in (q, k_BSKH, v_BSKV))
    out, (lse,) = jax.vmap(attend)(*arrays, *_ids(given.q_segment_ids, given.kv_segment_ids))
    out = out.swapaxes(1, 2).astype(jnp.float32)
    if given.q_segment_ids is not None:
        # A row of a document that has no key here gets the mean of the values, and about −2e38 for its log-sum-exp.
        real = given.q_segment_ids != 0
        out = jnp.where(real[:, :, None, None], out, 0)
        lse = jnp.where(real[:, None], lse, -jnp.inf)
    return out, lse


def block_backward(
    q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, out_BTNV: Array, lse_BNT: Array, d_out_BTNV: Array, given: Masks,
    *, interpret: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """See `kernels.attention.blocks.backward`. Each part's gradients are rounded to the dtype of their arrays.

    Calls the private function behind jax's own backward pass, with its arguments as jax 0.10.2 and 0.12 have them.
    """
    attend = _kernel(q_BTNH, k_BSKH, given.causal, interpret=interpret)
    if given.q_segment_ids is not None:
        real = given.q_segment_ids != 0
        d_out_BTNV = jnp.where(real[:, :, None, None], d_out_BTNV, 0)
        lse_BNT = jnp.where(real[:, None], lse_BNT, 1e30)  # probabilities of padding become 0
    fixed = {
        name: attend.kwargs[name]
        for name in ("mask_value", "is_mqa", "block_sizes", "mask_function", "attn_logits_soft_cap", "interpret")
    }

    def one(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, *ids: Any) -> tuple[Array, ...]:
        residuals = (q, k, v, ids[0] if ids else None, None, out, lse, attend.dq_mask_info, attend.dkv_mask_info)
        gradients = kernel._splash_attention_bwd(  # pyright: ignore[reportPrivateUsage]
            save_residuals=False, residual_checkpoint_name=None, res=residuals, do=d_out, **fixed
        )  # fmt: skip
        return gradients[3], gradients[4], gradients[5]

    q = q_BTNH * jnp.asarray(given.scale, q_BTNH.dtype)
    q, k, v, out, d_out = (x.swapaxes(1, 2) for x in (q, k_BSKH, v_BSKV, out_BTNV, d_out_BTNV))
    gradients = jax.vmap(one)(q, k, v, out, lse_BNT, d_out, *_ids(given.q_segment_ids, given.kv_segment_ids))
    dq, dk, dv = (x.swapaxes(1, 2).astype(jnp.float32) for x in gradients)
    return dq * given.scale, dk, dv


def _ids(q_segment_ids: Array | None, kv_segment_ids: Array | None) -> tuple[kernel.SegmentIds, ...]:
    if q_segment_ids is None or kv_segment_ids is None:
        return ()
    return (kernel.SegmentIds(q_segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32)),)


def _kernel(q_BTNH: Array, k_BSKH: Array, causal: bool, **options: Any) -> Any:
    """The kernel for one sequence of these shapes."""
    T, N = q_BTNH.shape[1:3]
    S = k_BSKH.shape[1]
    return kernel.make_splash_mha(
        masks.MultiHeadMask([_mask(T, S, causal)] * N),
        block_sizes=block_sizes(T, S, q_BTNH.dtype.itemsize),
        head_shards=1,
        q_seq_shards=1,
        **options,
    )


def block_sizes(T: int, S: int, itemsize: int) -> kernel.BlockSizes:
    """Tiles for queries of length T and keys of length S, both multiples of 128, in elements of `itemsize` bytes.

    Not tuned: no TPU was at hand. They are the largest known to compile (see `BLOCK_KV`), and divide the lengths.
    """
    shrink = max(1, itemsize // 2)
    block_q, block_kv = _divisor(T, BLOCK_Q // shrink), _divisor(S, BLOCK_KV // shrink)
    compute = _divisor(block_kv, BLOCK_KV_COMPUTE // shrink)
    fused = S // block_kv <= MAX_DQ_COPIES
    return kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def _divisor(length: int, most: int) -> int:
    """Largest multiple of 128 that divides `length` and is at most `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


@functools.lru_cache(maxsize=32)
def _mask(T: int, S: int, causal: bool) -> masks.Mask:
    """One head's mask. Cached because jax keys its own caches by the mask's function object."""
    return masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
