"""Grouped matmul as a loop over blocks of rows, in plain JAX.

Each block lies in one group, so the work is that of the rows plus half a block a group, where `lax.ragged_dot` on a CPU
multiplies every row by every group's matrix. The last block of a group reaches into the next group's rows; these are
masked when read, and what is written there is overwritten by the next group's own blocks, which come later.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.types import Array


def grouped_matmul_blocks(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    """See `kernels.grouped_matmul.grouped_matmul`."""
    return _product(x_MK, w_EKN, group_sizes_E.astype(jnp.int32))


def _block_rows(rows: int, groups: int) -> int:
    """Rows of a block: near the mean group, so that neither loop steps nor masked rows dominate."""
    mean = max(1, rows // max(1, groups))
    return min(256, max(16, 1 << (mean - 1).bit_length()))


class _Blocks:
    """Where each block of a loop lies: its group, its first row, and which of its rows are the group's."""

    def __init__(self, rows: int, sizes_E: Array):
        self.size = _block_rows(rows, sizes_E.shape[0])
        self.ends_E = jnp.cumsum(sizes_E)
        self.starts_E = self.ends_E - sizes_E
        self.last_block_E = jnp.cumsum((sizes_E + self.size - 1) // self.size)
        self.first_block_E = self.last_block_E - (sizes_E + self.size - 1) // self.size
        self.count = self.last_block_E[-1]

    def locate(self, b: Array) -> tuple[Array, Array]:
        """Group and first row of block b."""
        e = (b >= self.last_block_E).sum()
        return e, self.starts_E[e] + (b - self.first_block_E[e]) * self.size

    def read(self, x: Array, e: Array, row: Array) -> Array:
        """Rows of the block, those of later groups zeroed; `x` has at least a block of rows after the last group."""
        part = lax.dynamic_slice_in_dim(x, row, self.size)
        mine = row + jnp.arange(self.size) < self.ends_E[e]
        return jnp.where(mine[:, None], part, 0)


def _times(x_MK: Array, w_EKN: Array, sizes_E: Array, *, transpose: bool) -> Array:
    """x · w, or x · wᵀ where `transpose`, group by group."""
    M = x_MK.shape[0]
    acc = jnp.promote_types(x_MK.dtype, jnp.float32)
    blocks = _Blocks(M, sizes_E)
    x = jnp.pad(x_MK, ((0, blocks.size), (0, 0)))
    width = w_EKN.shape[1 if transpose else 2]

    def step(b: Array, out: Array) -> Array:
        e, row = blocks.locate(b)
        w = lax.dynamic_index_in_dim(w_EKN, e, keepdims=False)
        part = lax.dot_general(
            blocks.read(x, e, row), w, (((1,), (1 if transpose else 0,)), ((), ())), preferred_element_type=acc
        )
        return lax.dynamic_update_slice_in_dim(out, part.astype(out.dtype), row, axis=0)

    return lax.fori_loop(0, blocks.count, step, jnp.zeros((M + blocks.size, width), x_MK.dtype))[:M]


@jax.custom_vjp
def _product(x_MK: Array, w_EKN: Array, sizes_E: Array) -> Array:
    return _times(x_MK, w_EKN, sizes_E, transpose=False)


def _product_fwd(x_MK: Array, w_EKN: Array, sizes_E: Array):
    return _product(x_MK, w_EKN, sizes_E), (x_MK, w_EKN, sizes_E)


def _product_bwd(residuals, d_MN: Array):
    x_MK, w_EKN, sizes_E = residuals
    acc = jnp.promote_types(x_MK.dtype, jnp.float32)
    blocks = _Blocks(x_MK.shape[0], sizes_E)
    padding = ((0, blocks.size), (0, 0))
    x, d = jnp.pad(x_MK, padding), jnp.pad(d_MN, padding)

    def step(b: Array, dw_EKN: Array) -> Array:
        e, row = blocks.locate(b)
        # One side masked is enough: the other's foreign rows meet zeros.
        part = lax.dot_general(
            blocks.read(x, e, row), lax.dynamic_slice_in_dim(d, row, blocks.size), (((0,), (0,)), ((), ())),
            preferred_element_type=acc,
        )  # fmt: skip
        return dw_EKN.at[e].add(part)

    dw_EKN = lax.fori_loop(0, blocks.count, step, jnp.zeros(w_EKN.shape, acc))
    return _times(d_MN, w_EKN, sizes_E, transpose=True), dw_EKN.astype(w_EKN.dtype), None


_product.defvjp(_product_fwd, _product_bwd)
