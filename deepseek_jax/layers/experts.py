"""Dropless routed experts: sort token-expert pairs by expert, one grouped product a matrix, back, weigh and add up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax import platform
from deepseek_jax.kernels.grouped_matmul import grouped_matmul
from deepseek_jax.types import Array


def gather_rows(x_MD: Array, source_P: Array, place_MX: Array, sparse: bool = False) -> Array:
    """x[source], [P, D]. `place_MX` says where the X copies of each row went: gathers both ways, no scatter-add.

    `sparse`: most places may lie past the last of the P, and are none. Gradients are then added up a copy at a time: all at
    once would be M · X rows.

    A scatter-add would be slower on every device and, on a GPU, add in an order that changes from run to run.
    """
    rows: Any = _gather(x_MD, source_P, place_MX, sparse)
    return rows


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather(x_MD: Array, source_P: Array, place_MX: Array, sparse: bool) -> Array:
    return x_MD[source_P]


def _gather_fwd(x_MD: Array, source_P: Array, place_MX: Array, sparse: bool):
    return x_MD[source_P], place_MX


def _gather_bwd(sparse: bool, place_MX: Array, d_PD: Array):
    wide = jnp.promote_types(d_PD.dtype, jnp.float32)
    if sparse:
        return _weighed_rows(d_PD, jnp.ones(place_MX.shape, wide), place_MX), None, None
    return d_PD[place_MX].sum(axis=1, dtype=wide).astype(d_PD.dtype), None, None


_gather.defvjp(_gather_fwd, _gather_bwd)


def _rows(x: Array, index: Array) -> Array:
    """x[index], zero for an index past the last row."""
    return x.at[index].get(mode="fill", fill_value=0)


def _weighed_rows(x_PD: Array, weights_MX: Array, place_MX: Array) -> Array:
    """Σ over a row's X places of weight · x[place], [M, D]: a column at a time, in the dtype of the weights, rounded once."""

    def add(total_MD: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        place_M, weight_M = column
        return total_MD + _rows(x_PD, place_M).astype(total_MD.dtype) * weight_M[:, None], None

    total_MD = jnp.zeros((len(place_MX), x_PD.shape[1]), weights_MX.dtype)
    return lax.scan(add, total_MD, (place_MX.T, weights_MX.T))[0].astype(x_PD.dtype)


@jax.custom_vjp
def weighed_sums(out_PD: Array, weights_MX: Array, order_P: Array, place_MX: Array) -> Array:
    """Σ over each token's pairs of weight · result, [M, D] in the dtype of `out_PD`; where most of the M · X pairs are none.

    Gathers alone, forward and backward, and none of them as large as all pairs.

    Args:
        out_PD: results of the sorted pairs; zero for those that are none, or were not served.
        weights_MX: gate weights, float32 or wider.
        order_P: the pair of each result, see `sort_pairs`; the first P of them.
        place_MX: where each pair went, P or more where it is not among the results.
    """
    return _weighed_rows(out_PD, weights_MX, place_MX)


def _weighed_fwd(out_PD: Array, weights_MX: Array, order_P: Array, place_MX: Array):
    return _weighed_rows(out_PD, weights_MX, place_MX), (out_PD, weights_MX, order_P, place_MX)


def _weighed_bwd(residuals: tuple[Array, Array, Array, Array], d_MD: Array):
    out_PD, weights_MX, order_P, place_MX = residuals
    wide = weights_MX.dtype
    # Behind a barrier: else the TPU compiler widens both before it moves them, and holds all pairs in float32.
    d_PD, out_PD = lax.optimization_barrier((d_MD[order_P // place_MX.shape[1]], out_PD))
    by_weight_P = (d_PD.astype(wide) * out_PD.astype(wide)).sum(axis=1)
    by_out_PD = d_PD.astype(wide) * weights_MX.reshape(-1)[order_P][:, None]
    return by_out_PD.astype(out_PD.dtype), _rows(by_weight_P, place_MX), None, None


weighed_sums.defvjp(_weighed_fwd, _weighed_bwd)


Swiglu = Callable[[Array, Array], Array]
"""(rows [P, D] in order of their experts, rows of each expert [E]) -> [P, D]; zero for rows of no expert."""


def sort_pairs(indices_MX: Array, experts: int) -> tuple[Array, Array, Array]:
    """Token-expert pairs in order of their experts, those of one expert in order of their tokens.

    Returns:
        Int32 [M · X]: pair p of the sorted list was token order[p] // X. Int32 [M, X]: where each pair went. Int32 [E]:
        pairs of each of the `experts`.
    """
    flat_P = indices_MX.reshape(-1)
    order_P = checkpoint_name(jnp.argsort(flat_P, stable=True), "routing")
    place_MX = checkpoint_name(jnp.argsort(order_P), "routing").reshape(indices_MX.shape)
    return order_P, place_MX, jnp.bincount(flat_P, length=experts).astype(jnp.int32)


def grouped_swiglu(x_PD: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array, *, sizes_E: Array) -> Array:
    """SwiGLU of rows that lie in order of their experts, `sizes_E` of each: [P, D]."""
    gate_PF = checkpoint_name(grouped_matmul(x_PD, w_gate_EDF, sizes_E), "expert_gate")
    up_PF = checkpoint_name(grouped_matmul(x_PD, w_up_EDF, sizes_E), "expert_up")
    return grouped_matmul(jax.nn.silu(gate_PF) * up_PF, w_down_EFD, sizes_E)


def routed_experts(
    x_MD: Array, indices_MX: Array, weights_MX: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array
) -> Array:
    """Σ over the X chosen experts of weight · SwiGLU_e(x) (DeepSeekMoE eq. 9, V3 eq. 12).

    Args:
        x_MD: M tokens.
        indices_MX: their experts.
        weights_MX: their gate weights, float32 or wider; 0 for a dropped pair.
        w_gate_EDF: in the dtype of `x_MD`, like the other two.
        w_up_EDF: see `w_gate_EDF`.
        w_down_EFD: see `w_gate_EDF`.

    Returns:
        [M, D] in the dtype of `x_MD`; the weighted sum itself is float32 or wider.
    """
    swiglu = partial(grouped_swiglu, w_gate_EDF=w_gate_EDF, w_up_EDF=w_up_EDF, w_down_EFD=w_down_EFD)
    return sorted_experts(
        x_MD, indices_MX, weights_MX, len(w_gate_EDF), lambda x_PD, sizes_E: swiglu(x_PD, sizes_E=sizes_E)
    )


def sorted_experts(x_MD: Array, indices_MX: Array, weights_MX: Array, experts: int, swiglu: Swiglu) -> Array:
    """`routed_experts` with the products left to `swiglu`."""
    M, X = indices_MX.shape
    order_P, place_MX, sizes_E = sort_pairs(indices_MX, experts)
    x_PD = checkpoint_name(gather_rows(x_MD, order_P // X, place_MX), "expert_in")
    out_PD = checkpoint_name(swiglu(x_PD, sizes_E), "expert_out")
    out_MXD = gather_rows(out_PD, place_MX.reshape(-1), order_P[:, None]).reshape(M, X, -1)
    return jnp.einsum("mxd,mx->md", out_MXD.astype(weights_MX.dtype), weights_MX).astype(x_MD.dtype)


FEW_ROWS = 4
"""Tokens of a step up to which a GPU likes matrices with the summed dim last."""
_FEW = 64  # tokens; more of them keep a grouped product busy
_FEW_ON_CPU = 16  # there copying the chosen matrices beats sorting up to so many, and all experts never pay
_DENSE = 4  # where an expert in so many is chosen by a token, a few tokens choose nearly all


def few_tokens_experts(
    x_MD: Array, indices_MX: Array, weights_MX: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array
) -> Array | None:
    """As `routed_experts`, for the few tokens of a decoding step, where reading the weights is all the time it takes.

    Either the chosen matrices alone are read, or, on accelerators and with few experts, every expert serves every token and
    the gate's zeros leave out what was not chosen. None where neither is cheaper than the sorted form. What is cheaper
    was measured on an H100 and on a CPU.
    """
    (M, X), E = indices_MX.shape, w_gate_EDF.shape[0]
    wide = weights_MX.dtype
    target = platform.target()
    if (M <= _FEW_ON_CPU) if target == "cpu" else (M * X < E and M <= _FEW // 8):
        times = _chosen_on_gpu if target == "gpu" and M <= FEW_ROWS else _chosen
        inputs_MXD = jnp.broadcast_to(x_MD[:, None], (M, X, x_MD.shape[1]))
        gate, up = (times(inputs_MXD, w, indices_MX).astype(x_MD.dtype) for w in (w_gate_EDF, w_up_EDF))
        out_MXD = times(jax.nn.silu(gate) * up, w_down_EFD, indices_MX)
        return jnp.einsum("mxd,mx->md", out_MXD.astype(wide), weights_MX).astype(x_MD.dtype)
    if target != "cpu" and M <= _FEW and E <= _DENSE * X:
        gates_ME = jnp.zeros((M, E), wide).at[jnp.arange(M)[:, None], indices_MX].set(weights_MX)
        gate = jnp.einsum("md,edf->emf", x_MD, w_gate_EDF)
        up = jnp.einsum("md,edf->emf", x_MD, w_up_EDF)
        out_EMD = jnp.einsum("emf,efd->emd", jax.nn.silu(gate) * up, w_down_EFD)
        if x_MD.dtype == jnp.float16:  # an expert that was not chosen may overflow: 0 · inf is no 0
            out_EMD = jnp.where(gates_ME.T[..., None] == 0, 0, out_EMD)
        return jnp.einsum("emd,me->md", out_EMD.astype(wide), gates_ME).astype(x_MD.dtype)
    return None


def _chosen(x_MXI: Array, w_EIO: Array, indices_MX: Array) -> Array:
    """x times the chosen matrices, [M, X, O]."""
    return jnp.einsum("mxi,mxio->mxo", x_MXI, w_EIO[indices_MX])


def _chosen_on_gpu(x_MXI: Array, w_EIO: Array, indices_MX: Array) -> Array:
    """As `_chosen`, float32 or wider: written as a sum, which the compiler fuses with the choice of the matrices, where a
    product would copy them first. Matrices that decoding turned (models/cached.py) are read where they are."""
    wide = jnp.promote_types(x_MXI.dtype, jnp.float32)
    w_EOI = w_EIO.swapaxes(1, 2)
    return (x_MXI[:, :, None].astype(wide) * w_EOI[indices_MX].astype(wide)).sum(axis=-1)
