"""Grouped matmul: rows sorted by group, each group with a matrix of its own. The heart of dropless experts.

Routes: `reference` (one masked product a group, the meaning), `blocks` (loop over row blocks in plain JAX, any device,
the default on CPU), `ragged_dot` (`jax.lax.ragged_dot`, TPU), `mosaic_gpu` (the Mosaic kernels inside jax, Hopper).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from deepseek_jax import platform
from deepseek_jax.kernels.grouped_matmul.blocks import grouped_matmul_blocks
from deepseek_jax.kernels.grouped_matmul.reference import grouped_matmul_reference
from deepseek_jax.types import Array

Implementation = Literal["reference", "blocks", "ragged_dot", "mosaic_gpu"]
_FASTEST: dict[platform.Platform, Implementation] = {"tpu": "ragged_dot", "gpu": "mosaic_gpu", "cpu": "blocks"}


def grouped_matmul(
    x_MK: Array, w_EKN: Array, group_sizes_E: Array, *, implementation: Implementation | None = None
) -> Array:
    """Row m of group e times matrix e.

    Args:
        x_MK: rows, those of group 0 first, then group 1, …
        w_EKN: one matrix a group, of the dtype of `x_MK`.
        group_sizes_E: int32, rows of each group; a group may be empty, their sum may be less than M.
        implementation: a route by name; None takes the fastest that supports the arguments, and `blocks`, which the
            compiler can partition, where several devices share the call.

    Returns:
        [M, N] in the dtype of `x_MK`; rows past the sum of the sizes are zero. Sums are float32 or wider.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a named route that does not support the arguments.
    """
    if x_MK.ndim != 2 or w_EKN.ndim != 3 or x_MK.shape[1] != w_EKN.shape[1]:
        raise ValueError(f"grouped_matmul: x {x_MK.shape} and w {w_EKN.shape} are not [M,K] and [E,K,N]")
    if group_sizes_E.shape != w_EKN.shape[:1] or not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(
            f"grouped_matmul: group_sizes must be {w_EKN.shape[0]} integers, "
            f"not {group_sizes_E.dtype} {group_sizes_E.shape}"
        )
    if x_MK.dtype != w_EKN.dtype:
        raise ValueError(f"grouped_matmul: x is {x_MK.dtype} but w is {w_EKN.dtype}: cast one of them")
    strict = implementation is not None
    if implementation is None:
        implementation = "blocks" if _shared_by_devices() else _FASTEST[platform.target()]
    if implementation == "reference":
        return grouped_matmul_reference(x_MK, w_EKN, group_sizes_E)
    if implementation == "ragged_dot":
        from deepseek_jax.kernels.grouped_matmul import ragged_tpu as route

        function = route.grouped_matmul_ragged_dot
    elif implementation == "mosaic_gpu":
        from deepseek_jax.kernels.grouped_matmul import mosaic_gpu as route

        function = route.grouped_matmul_mgpu
    else:
        return grouped_matmul_blocks(x_MK, w_EKN, group_sizes_E)
    reason = route.supports(x_MK, w_EKN, group_sizes_E)
    if reason is None:
        return function(x_MK, w_EKN, group_sizes_E)
    if strict:
        raise ValueError(f"grouped_matmul: implementation={implementation!r} does not serve this call: {reason}")
    return grouped_matmul_blocks(x_MK, w_EKN, group_sizes_E)


def _shared_by_devices() -> bool:
    """Whether the compiler is to spread this call over several devices, which it cannot do with a kernel's call."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types)


__all__ = ["Implementation", "grouped_matmul", "grouped_matmul_blocks", "grouped_matmul_reference"]
