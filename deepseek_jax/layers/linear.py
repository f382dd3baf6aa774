"""Products of activations and weights, and the dtype in which gradients of weights leave them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.layers.weights import at_least_float32
from deepseek_jax.types import Array


def linear(subscripts: str, x: Array, w: Array) -> Array:
    """`einsum(subscripts, x, w)` in the dtype of `x`; the gradient of `w` comes in the dtype of `w`.

    A weight that is given in float32 therefore has its gradient summed in float32 all the way: over the tokens of a device,
    then over devices. Cast by the caller to the dtype of `x`, it is rounded before devices add theirs.

    Args:
        subscripts: of two operands; every letter in two of the three terms.
        x: activations.
        w: of the dtype of `x`, or wider.
    """
    if w.dtype == x.dtype:
        return jnp.einsum(subscripts, x, w)
    product: Any = _wide(subscripts, x, w)
    return product


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide(subscripts: str, x: Array, w: Array) -> Array:
    return jnp.einsum(subscripts, x, w.astype(x.dtype))


def _wide_fwd(subscripts: str, x: Array, w: Array):
    return _wide(subscripts, x, w), (x, w)


def _wide_bwd(subscripts: str, residuals: tuple[Array, Array], d: Array):
    x, w = residuals
    inputs, out = subscripts.split("->")
    ours, weights = inputs.split(",")
    dx = jnp.einsum(f"{out},{weights}->{ours}", d, w.astype(x.dtype))
    dw = jnp.einsum(f"{ours},{out}->{weights}", x, d, preferred_element_type=at_least_float32(w.dtype))
    return dx, dw.astype(w.dtype)


_wide.defvjp(_wide_fwd, _wide_bwd)


def add_bias(x: Array, b: Array) -> Array:
    """x + b in the dtype of `x`; the gradient of `b`, which has the last dims of `x`, comes in the dtype of `b`."""
    out: Any = _biased(x, b)
    return out


@jax.custom_vjp
def _biased(x: Array, b: Array) -> Array:
    return x + b.astype(x.dtype)


def _biased_bwd(b: Array, d: Array):
    wide = at_least_float32(b.dtype)
    return d, d.sum(axis=tuple(range(d.ndim - b.ndim)), dtype=wide).astype(b.dtype)


_biased.defvjp(lambda x, b: (_biased(x, b), b), _biased_bwd)
