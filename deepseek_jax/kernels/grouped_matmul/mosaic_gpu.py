"""Grouped matmul on Hopper GPUs by the Mosaic kernels that ship inside jax.

Source: `jax.experimental.pallas.ops.gpu.ragged_dot_mgpu` (rows of a group times its matrix, or the transposed matrix) and
`transposed_ragged_dot_mgpu` (one product of rows a group, for the gradient of the matrices). Both are samples: they leave
rows past the last group unwritten and take their tiles from the caller. What is added here: the gradient, the zero rows,
the tiles, and the conditions under which they are right.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.types import Array

# Inner tile: 64 elements of 2 bytes are the 128-byte swizzle of shared memory that wgmma reads.
BLOCK_K = 64


class Tiles(NamedTuple):
    """What the sample kernels ask for; see `tiles`."""

    block_m: int
    block_n: int
    block_k: int
    max_concurrent_steps: int
    grid_block_n: int


def tiles(m: int, k: int, n: int, e: int) -> Tiles:
    """Tiles for m rows in e groups, inner width k, outer width n (multiples of 64), the matrices transposed or not.

    128x128x64 with five stages and bands of four columns came first of 22 settings in the mean over five shapes (V2-Lite's
    and V3's experts, even and long-tailed groups; one H100, jax 0.11.2). Tiles of 192 rows are up to 4 % faster on even
    groups and up to 11 % slower on uneven ones. Without bands (`grid_block_n` 1) the matrices fall out of the L2 cache:
    half the speed. Six stages cost 10 to 20 %.

    The grid holds one tile a group more than the rows need. Where groups are small that is most of the work, so tiles of
    64 rows (reasoned, not measured).
    """
    block_m = 128 if m >= 256 * e else 64
    return Tiles(block_m, 128 if n % 128 == 0 else 64, BLOCK_K, _stages(k), 4)


def wgrad_tiles(m: int, k: int, n: int) -> Tiles:
    """Tiles for the gradient of matrices [k, n] (multiples of 64) over m rows, the inner width here; the same sweep."""
    return Tiles(128 if k % 128 == 0 else 64, 128 if n % 128 == 0 else 64, BLOCK_K, _stages(m), 4)


def _stages(width: int) -> int:
    """Stages of the pipeline over an inner width. The kernels do with fewer inner tiles than that, but ask for two."""
    return max(2, min(5, width // BLOCK_K))


def supports(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> str | None:
    """None where `grouped_matmul_mgpu` serves these arguments on this machine's first GPU, else the reason why not."""
    del group_sizes_E
    E, K, N = w_EKN.shape
    if x_MK.dtype != w_EKN.dtype or x_MK.dtype.name not in ("bfloat16", "float16"):
        return f"the Mosaic kernels take bfloat16 or float16 on both sides, not {x_MK.dtype} and {w_EKN.dtype}"
    if K % 64 or N % 64 or not K or not N or not E or not x_MK.shape[0]:
        return f"the Mosaic kernels take widths that are multiples of 64, and no empty side, not {x_MK.shape}, {w_EKN.shape}"
    if jnp.result_type(int) != jnp.int32:
        return "the Mosaic kernels count in the default integer, which must be 32 bits: jax_enable_x64 is on"
    try:
        capability = str(jax.local_devices(backend="cuda")[0].compute_capability)
    except RuntimeError:
        return "there is no NVIDIA GPU"
    if capability != "9.0":
        return f"the Mosaic kernels are written for compute capability 9.0 (wgmma), not {capability}"
    return None


def grouped_matmul_mgpu(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    """See `kernels.grouped_matmul.grouped_matmul`; call it only where `supports` is None.

    Rows past the last group must be finite: the gradient of the matrices multiplies up to 63 of them by zero.

    Returns:
        [M, N] in the dtype of `x_MK`, summed in float32.
    """
    M = x_MK.shape[0]
    # The copy engine's tiles are eight rows high; the kernels refuse another number of rows.
    x = jnp.pad(x_MK, ((0, -M % 8), (0, 0)))
    return _product(x, w_EKN, group_sizes_E.astype(jnp.int32))[:M]


def _rows_of_groups(y: Array, sizes_E: Array) -> Array:
    """`y` with the rows past the last group zeroed; the compiler fuses this into what reads or writes `y`."""
    return jnp.where((jnp.arange(y.shape[0]) < jnp.sum(sizes_E))[:, None], y, 0)


def _times(x: Array, w: Array, sizes_E: Array, *, transpose: bool) -> Array:
    """x · w, or x · wᵀ where `transpose`, group by group."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    n = w.shape[1 if transpose else 2]
    chosen = tiles(x.shape[0], x.shape[1], n, w.shape[0])
    out = ragged_dot(x, w, group_sizes=sizes_E, transpose_rhs=transpose, **chosen._asdict())
    return _rows_of_groups(out, sizes_E)


@jax.custom_vjp
def _product(x_MK: Array, w_EKN: Array, sizes_E: Array) -> Array:
    return _times(x_MK, w_EKN, sizes_E, transpose=False)


def _product_fwd(x_MK: Array, w_EKN: Array, sizes_E: Array):
    return _product(x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _product_bwd(residuals, d_MN: Array):
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    x_MK, w_EKN, sizes_E = residuals
    dx_MK = _times(d_MN, w_EKN, sizes_E, transpose=True)
    # The kernel masks foreign rows of its left side only, by a product; so that no NaN meets that zero, these are zeroed.
    d = _rows_of_groups(d_MN, sizes_E)
    chosen = wgrad_tiles(x_MK.shape[0], *w_EKN.shape[1:])
    dw_EKN = transposed_ragged_dot(x_MK, d, group_sizes=sizes_E, **chosen._asdict())
    return dx_MK, dw_EKN, None


_product.defvjp(_product_fwd, _product_bwd)
