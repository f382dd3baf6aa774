"""The meaning of `grouped_matmul`: every group's matrix on every row, masked. E times the work; for tests."""

import jax.numpy as jnp

from deepseek_jax.types import Array


def grouped_matmul_reference(x_MK: Array, w_EKN: Array, group_sizes_E: Array) -> Array:
    """See `kernels.grouped_matmul.grouped_matmul`."""
    acc = jnp.promote_types(x_MK.dtype, jnp.float32)
    ends_E = jnp.cumsum(group_sizes_E)
    rows_M = jnp.arange(x_MK.shape[0])
    out_MN = jnp.zeros((x_MK.shape[0], w_EKN.shape[2]), acc)
    for e in range(w_EKN.shape[0]):
        mine_M = (rows_M >= ends_E[e] - group_sizes_E[e]) & (rows_M < ends_E[e])
        out_MN += jnp.where(mine_M[:, None], jnp.dot(x_MK, w_EKN[e], preferred_element_type=acc), 0)
    return out_MN.astype(x_MK.dtype)
