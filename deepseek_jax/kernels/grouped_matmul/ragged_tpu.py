"""Grouped matmul on TPU: `jax.lax.ragged_dot`, and megablox for the gradient of the matrices.

The TPU compiler turns `lax.ragged_dot` and its gradient with respect to the rows into a grouped Mosaic kernel, but
expands the one with respect to the matrices densely: E times the products, seen in the compiled program of jax 0.10.2
with libtpu 0.0.42. That one is `tgmm` of `jax.experimental.pallas.ops.tpu.megablox` (Gale et al. 2022).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.types import Array

LANES = 128
# Rows, K and N of a tile of the matrices' gradient; the float32 accumulator [K, N] stays in VMEM. Not tuned: no TPU was at
# hand, these compile for v5e and v5p.
WGRAD_TILES = (512, 1024, 512)


def supports(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> str | None:
    """None where `grouped_matmul_ragged_dot` serves these arguments, else the reason why not."""
    del group_sizes_E
    if x_MK.dtype != w_EKN.dtype or x_MK.dtype.name not in ("bfloat16", "float32"):
        return f"the TPU kernels take bfloat16 or float32 on both sides, not {x_MK.dtype} and {w_EKN.dtype}"
    return None


def grouped_matmul_ragged_dot(x_MK: Array, w_EKN: Array, group_sizes_E: Array, *, interpret: bool = False) -> Array:
    """See `kernels.grouped_matmul.grouped_matmul`.

    Args:
        x_MK, w_EKN, group_sizes_E: as there.
        interpret: run the Pallas part of the backward pass in the interpreter, on any device (tests).

    Returns:
        [M, N] in the dtype of `x_MK`, summed in float32.
    """
    return _product(interpret, x_MK, w_EKN, group_sizes_E.astype(jnp.int32))


def _rows_of_groups(y: Array, sizes_E: Array) -> Array:
    """`y` with the rows past the last group zeroed: what a kernel leaves there is not specified."""
    return jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes_E))[:, None], y, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret: bool, x_MK: Array, w_EKN: Array, sizes_E: Array) -> Array:
    del interpret
    return _rows_of_groups(lax.ragged_dot(x_MK, w_EKN, sizes_E), sizes_E)


def _product_fwd(interpret: bool, x_MK: Array, w_EKN: Array, sizes_E: Array):
    return _product(interpret, x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _product_bwd(interpret: bool, residuals, d_MN: Array):
    # By its full path: the package's own attribute `gmm` is a function.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_MK, w_EKN, sizes_E = residuals
    dx_MK = _rows_of_groups(lax.ragged_dot(d_MN, w_EKN.swapaxes(1, 2), sizes_E), sizes_E)
    M, (K, N) = x_MK.shape[0], w_EKN.shape[1:]
    # tgmm wants whole tiles of rows; rows that belong to no group are masked inside it.
    padding = ((0, -M % LANES), (0, 0))
    x, d = jnp.pad(x_MK, padding), jnp.pad(d_MN, padding)
    shrink = max(1, x_MK.dtype.itemsize // 2)
    rows = next(size for size in (WGRAD_TILES[0] // shrink, 256, LANES) if x.shape[0] % size == 0)
    tiles = (rows, min(WGRAD_TILES[1] // shrink, K), min(WGRAD_TILES[2], N))
    dw_EKN = tgmm(x.swapaxes(0, 1), d, sizes_E, w_EKN.dtype, tiles, interpret=interpret)
    return dx_MK, dw_EKN, None


_product.defvjp(_product_fwd, _product_bwd)
