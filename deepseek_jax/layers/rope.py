"""Rotary position embedding (Su et al. 2021) in both layouts, with linear, llama3 and YaRN scaling.

YaRN is arXiv 2309.00071 as V2 (section 3.1.4) and V3 (section 4.3) use it: frequencies interpolated along a ramp, and a
softmax temperature that enters as m² in the softmax scale, cos and sin multiplied by m(mscale) / m(mscale_all_dim).
"""

import math

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import LinearScaling, Llama3Scaling, Rope, YarnScaling
from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.types import Array


def inverse_frequencies(rope: Rope, dim: int) -> np.ndarray:
    """Angle per position of each of the dim / 2 pairs, after scaling. Float64 [dim / 2], radians a position."""
    plain = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return plain * keep + plain / scaling.factor * (1 - keep)
    if isinstance(scaling, YarnScaling):
        keep = 1 - yarn_ramp(scaling, rope.theta, dim)
        return plain * keep + plain / scaling.factor * (1 - keep)
    return plain


def yarn_ramp(scaling: YarnScaling, theta: float, dim: int) -> np.ndarray:
    """0 where a pair keeps its frequency, 1 where it is divided by the factor. Float64 [dim / 2]."""

    def pair_with(turns: float) -> float:
        """Index of the pair that makes so many turns over the original context."""
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001  # the published code's guard against a step of no width
    return np.clip((np.arange(dim // 2) - low) / width, 0, 1)


def yarn_temperature(factor: float, mscale: float) -> float:
    """m = 0.1 · mscale · ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(head_dim: int, rope: Rope) -> float:
    """1 / sqrt(head_dim), times m(mscale_all_dim)² under YaRN; `head_dim` counts all dims of a query."""
    scale = head_dim**-0.5
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.mscale_all_dim:
        scale *= yarn_temperature(rope.scaling.factor, rope.scaling.mscale_all_dim) ** 2
    return scale


def rope_tables(rope: Rope, dim: int, positions_BT: Array, dtype: str | jnp.dtype) -> tuple[Array, Array]:
    """cos and sin [B, T, dim / 2] of every pair's angle, in float32 or wider."""
    wide = at_least_float32(dtype)
    angles = positions_BT[..., None].astype(wide) * jnp.asarray(inverse_frequencies(rope, dim), wide)
    factor = 1.0
    if isinstance(rope.scaling, YarnScaling):
        scaling = rope.scaling
        factor = yarn_temperature(scaling.factor, scaling.mscale)
        factor /= yarn_temperature(scaling.factor, scaling.mscale_all_dim)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(x_BTNR: Array, cos_BTr: Array, sin_BTr: Array, *, interleaved: bool) -> Array:
    """Rotate every pair of the last dim by its angle; the layout of the result is that of the input.

    Args:
        x_BTNR: any number of heads.
        cos_BTr: [B, T, R / 2].
        sin_BTr: [B, T, R / 2].
        interleaved: pairs are (0,1), (2,3), … (MLA); else (i, i + R/2) (Llama).
    """
    cos, sin = cos_BTr[:, :, None], sin_BTr[:, :, None]
    x = x_BTNR.astype(cos.dtype)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        out = jnp.stack(rotated, axis=-1).reshape(x.shape)
    else:
        out = jnp.concatenate(rotated, axis=-1)
    return out.astype(x_BTNR.dtype)
