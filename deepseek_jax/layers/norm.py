"""RMSNorm (Zhang & Sennrich 2019), the only norm of the line up to V3."""

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from deepseek_jax.layers.weights import at_least_float32, weight
from deepseek_jax.types import Array


def rms_norm(x: Array, scale_D: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · scale over the last dim, in float32 or wider; returns the dtype of `x`."""
    wide = at_least_float32(x.dtype)
    x_wide = x.astype(wide)
    inverse = lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + eps)
    return (x_wide * inverse * scale_D.astype(wide)).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dim with a learned scale."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = weight(self, "scale", (x.shape[-1],), ("norm",), dtype=self.param_dtype, constant=1.0)
        return rms_norm(x, scale, self.eps)
