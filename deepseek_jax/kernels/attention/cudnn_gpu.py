"""Attention on NVIDIA GPUs by cuDNN's flash attention, through the route inside jax.

Source: `jax._src.cudnn.fused_attention_stablehlo.dot_product_attention`. The public `jax.nn.dot_product_attention` calls
the same function but refuses values whose head dim differs from the keys', so MLA (192/128) needs the inner one. It is
private: its arguments are passed by keyword, those that jax 0.10.2, 0.11.2 and 0.12 share.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.types import Array

HOPPER = (9, 0)
AMPERE = (8, 0)
MLA_CUDNN_VERSION = 91000

# Name of the primitive whose two outputs, attention and its log-sum-exp, the backward pass needs. They are made inside
# jax, so checkpoint names do not reach them; a remat policy that keeps attention asks for this primitive.
PRIMITIVE = "dot_product_attention_fwd_wrapper"


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
    """None where `cudnn` serves these arguments on this machine's first GPU, else the reason why not.

    Segment ids are refused: an explicit mask is a [T, S] array, and slow; cuDNN's packed layout needs a static number of
    segments a row, keeps a log-sum-exp that many times as large, and in jax 0.10 takes the key offsets from the query's
    heads, which is wrong for grouped heads.
    """
    del scale
    dtypes = {x.dtype.name for x in (q_BTNH, k_BSKH, v_BSKV)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        return f"cuDNN takes q, k, v of one dtype, bfloat16 or float16, not {sorted(dtypes)}"
    if q_segment_ids is not None or kv_segment_ids is not None:
        return "cuDNN takes no segment ids"
    N, H = q_BTNH.shape[2:]
    K, V = v_BSKV.shape[2:]
    if N % K:
        return f"cuDNN takes query heads in equal groups, not N={N} over K={K}"
    if causal and q_BTNH.shape[1] != k_BSKH.shape[1]:
        return f"cuDNN's causal mask is by index here: T={q_BTNH.shape[1]} must be S={k_BSKH.shape[1]}"
    if not causal and (q_BTNH.shape[1] % 2 or k_BSKH.shape[1] % 2):
        return f"jax takes cuDNN's gradient at even lengths only, not T={q_BTNH.shape[1]}, S={k_BSKH.shape[1]}"
    capability, version = _gpu()
    if capability is None:
        return "there is no NVIDIA GPU"
    if capability < AMPERE:
        return f"cuDNN's flash attention needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    if version is None:
        return "jax finds no cuDNN"
    most = 256 if capability >= HOPPER else 128
    if H % 8 or V % 8 or max(H, V) > most:
        return f"cuDNN takes head dims that are multiples of 8 up to {most} here, not {H} and {V}"
    if H != V and (capability < HOPPER or version < MLA_CUDNN_VERSION):
        return f"cuDNN takes head dims {H} and {V} from compute capability 9.0 and cuDNN 9.10 on, not cuDNN {version}"
    return None


def cudnn(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKV: Array,
    *,
    scale: float,
    q_segment_ids: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
) -> Array:
    """See `kernels.attention.attention`; call it only where `supports` is None.

    XLA's deterministic flags make the backward pass keep a [B, N, T, S] buffer on Hopper with cuDNN before 9.25.

    Returns:
        [B, T, N, V] in the dtype of `v_BSKV`.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    del q_segment_ids, kv_segment_ids
    T = q_BTNH.shape[1]
    if T % 2:
        # jax refuses the gradient at odd lengths. Under the causal mask no row of these sees the key that is added.
        q_BTNH, k_BSKH, v_BSKV = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKV))
    out: Any = fused.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKV,
        scale=float(scale),
        mask_type=fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK,
        qkv_layout="BTNH",
    )
    return out[:, :T]


def _gpu() -> tuple[tuple[int, int] | None, int | None]:
    """Compute capability of the first NVIDIA GPU, and the version of the cuDNN that jax loaded; None where absent."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None, None
    major, minor = str(device.compute_capability).split(".")
    from jax._src.lib import cuda_versions

    return (int(major), int(minor)), None if cuda_versions is None else int(cuda_versions.cudnn_get_version())
