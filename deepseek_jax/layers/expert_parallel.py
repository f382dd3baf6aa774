"""Routed experts on a mesh: every device gathers its experts' weights, tokens go to the experts, results come back.

Two exchanges of tokens between the shards of the experts, both without a capacity:

- `ragged`: pairs are sorted by expert, the shards tell one another how many there are, a ragged all-to-all moves them, a
  second sort puts what came from many shards in order of the experts. A pair travels once.
- `ring`: all tokens of the shards are gathered, every shard serves the pairs of its own experts, and the sums are reduced
  and scattered. No ragged collective; cheaper where a token's experts lie on most shards, or tokens are few.

Where the experts of several slices are not the same, what crosses slices does so before and after (expert_slices.py).
Everything is local to one `shard_map`, so the same code runs where the experts are not split at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.config import ModelConfig, MoE
from deepseek_jax.layers.expert_slices import across_slices, slices_of_token
from deepseek_jax.layers.experts import (
    Swiglu,
    few_tokens_experts,
    gather_rows,
    grouped_swiglu,
    sort_pairs,
    sorted_experts,
    weighed_sums,
)
from deepseek_jax.parallel.exchange import by_expert, gather_weight, plan_runs, scattered_sum, send_rows
from deepseek_jax.parallel.rules import axes_of, sharded_map
from deepseek_jax.types import Array


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How a mesh serves routed experts; the fields `expert_…` of `ModelConfig`."""

    way: Literal["ragged", "ring"] = "ragged"
    """How tokens get to their experts."""
    buffer_factor: float | None = None
    """Places of a shard for the pairs it receives, over its even share of them; None: room for all that can come. Pairs
    that find no place are left out and counted. Of training alone: decoding, where nobody would hear of it, has room."""
    gather_parts: int = 1
    """Runs in which a device gathers its experts and serves their rows, one after the other."""
    wide_sums: bool = False
    """Add up weights' gradients over devices in float32 or wider, not in the dtype of `x_BTD`."""
    across_slices: bool = False
    """Whether each slice holds experts of its own, not copies of all."""
    groups: tuple[int, int] = (1, 1)
    """Of experts, and how many of them a token's experts lie in: what bounds the slices that it goes to."""

    @classmethod
    def of(cls, config: ModelConfig) -> "Exchange":
        """The one that a model asks for."""
        return cls(
            way=config.expert_exchange, buffer_factor=config.expert_buffer_factor, gather_parts=config.expert_gather_parts,
            wide_sums=config.wide_sums, across_slices=config.expert_across_slices,
            groups=(config.ffn.n_group, config.ffn.topk_group) if isinstance(config.ffn, MoE) else (1, 1),
        )  # fmt: skip

    @property
    def axis(self) -> str:
        """Logical axis of the experts."""
        return "expert_of_slice" if self.across_slices else "expert"

    def places(self, tokens: int, chosen: int, experts: int, shards: int, slices: int) -> "Places":
        """Sizes of a device's buffers.

        Args:
            tokens: of a device.
            chosen: experts of a token.
            experts: of all slices.
            shards: of a slice's experts.
            slices: that hold experts of their own; 1 where each holds all.
        """

        def bounded(even: int, most: int) -> int:
            return most if self.buffer_factor is None else min(most, 8 * math.ceil(self.buffer_factor * even / 8))

        here = experts // slices
        arrivals = bounded(tokens * slices_of_token(self.groups, chosen, slices), tokens * slices)
        return Places(
            departures=min(tokens * min(chosen, slices), arrivals),
            arrivals=arrivals,
            pairs=bounded(tokens * chosen, arrivals * min(chosen, here)),
            rows=bounded(tokens * chosen, tokens * slices * shards * min(chosen, here // shards)),
        )


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places of a device's buffers, in rows."""

    departures: int
    """For (token, slice) on the way to the slices."""
    arrivals: int
    """For tokens that come from the slices."""
    pairs: int
    """For their token-expert pairs, on the way to the shards of the slice's experts."""
    rows: int
    """For pairs of the device's own experts."""


_TOKENS = ("batch", "length", "none")


def parallel_experts(
    x_BTD: Array, indices_BTX: Array, weights_BTX: Array, w_gate_EDF: Array, w_up_EDF: Array, w_down_EFD: Array,
    *, exchange: Exchange, decoding: bool, valid_BT: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """As `routed_experts`, under the ambient mesh.

    Args:
        x_BTD: tokens, spread over the mesh by batch and length.
        indices_BTX: their experts.
        weights_BTX: their gate weights, float32 or wider.
        w_gate_EDF: as stored, like the other two; each device gathers its experts in the dtype of `x_BTD`.
        w_up_EDF: see `w_gate_EDF`.
        w_down_EFD: see `w_gate_EDF`.
        exchange: see there.
        decoding: no gradient is wanted, and there may be few tokens.
        valid_BT: bool; the others take no place from these in buffers that are bounded, and come back as 0 there.

    Returns:
        [B, T, D] in the dtype of `x_BTD`, and float32 []: pairs left out, on all devices.
    """
    experts, inner, storage = axes_of("expert"), axes_of("ffn"), axes_of("expert_embed")
    slices = tuple(axis for axis in axes_of(exchange.axis) if axis not in experts)
    everyone = (*axes_of("batch"), *axes_of("length"))
    dtype, E = x_BTD.dtype.name, w_gate_EDF.shape[0]
    if decoding:
        exchange = replace(exchange, buffer_factor=None)
    if valid_BT is None:
        valid_BT = jnp.ones(x_BTD.shape[:2], bool)

    def local(x_BTD: Array, indices: Array, weights: Array, valid_BT: Array, *stored: Array) -> tuple[Array, Array]:
        B, T, D = x_BTD.shape
        X = indices.shape[-1]
        x_MD, indices_MX, weights_MX = x_BTD.reshape(B * T, D), indices.reshape(B * T, X), weights.reshape(B * T, X)
        whole = partial(_gathered, axes=storage, dtype=dtype, wide_sums=exchange.wide_sums)
        swiglu = partial(_in_parts, exchange.gather_parts, stored, whole)
        if not experts and not slices:
            few = few_tokens_experts(x_MD, indices_MX, weights_MX, *whole(stored)) if decoding else None
            out_MD = sorted_experts(x_MD, indices_MX, weights_MX, E, swiglu) if few is None else few
            left_out = jnp.zeros((), jnp.float32)
        else:
            serve = _ragged if exchange.way == "ragged" and experts and not decoding else _ring
            S, L = (lax.axis_size(axes) if axes else 1 for axes in (experts, slices))
            if exchange.buffer_factor is not None:
                indices_MX = jnp.where(valid_BT.reshape(B * T, 1), indices_MX, E)  # no expert's
            places = exchange.places(B * T, X, E, S, L)
            within = partial(serve, swiglu=swiglu, E=E // L, rows=places.rows, axes=experts)
            if slices:
                out_MD, left_out = across_slices(
                    x_MD, indices_MX, weights_MX, E, places.departures, places.arrivals, slices,
                    partial(within, pairs=places.pairs),
                )  # fmt: skip
            else:
                out_MD, left_out = within(x_MD, indices_MX, weights_MX)
        if inner:  # every device has summed over its part of F
            out_MD = lax.psum(out_MD, inner)
        return out_MD.reshape(B, T, D), lax.psum(left_out, everyone) if everyone else left_out

    inward, outward = (exchange.axis, "expert_embed", "ffn"), (exchange.axis, "ffn", "expert_embed")
    in_names = (_TOKENS, _TOKENS, _TOKENS, _TOKENS[:2], inward, inward, outward)
    mapped = sharded_map(local, in_names, (_TOKENS, ()))
    return mapped(x_BTD, indices_BTX, weights_BTX, valid_BT, w_gate_EDF, w_up_EDF, w_down_EFD)


def _gathered(stored: Sequence[Array], axes: tuple[str, ...], dtype: str, wide_sums: bool) -> Any:
    dims = (1, 1, 2)
    return tuple(gather_weight(w, axes, dim, dtype, wide_sums=wide_sums) for w, dim in zip(stored, dims, strict=True))


def _in_parts(parts: int, stored: Sequence[Array], whole: Any, x_PD: Array, sizes_E: Array) -> Array:
    """`grouped_swiglu` of rows in order of their experts, with the weights of E / parts experts at a time."""
    if parts == 1:
        return grouped_swiglu(x_PD, *whole(stored), sizes_E=sizes_E)
    E = len(sizes_E)
    if E % parts:
        raise ValueError(f"ModelConfig.expert_gather_parts = {parts}: must divide the {E} experts of a device")
    sizes_GE = sizes_E.reshape(parts, -1)
    ends_G = jnp.cumsum(sizes_GE.sum(axis=1))

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def of_part(x_PD: Array, part: tuple[Any, Array, Array]) -> Array:
        matrices, sizes_E, first = part
        out_PD = grouped_swiglu(jnp.roll(x_PD, -first, axis=0), *whole(matrices), sizes_E=sizes_E)
        return jnp.roll(out_PD, first, axis=0)  # rows of other parts are zero

    def add(out_PD: Array, part: tuple[Any, Array, Array]) -> tuple[Array, None]:
        return out_PD + of_part(x_PD, part), None

    runs = tuple(w.reshape(parts, E // parts, *w.shape[1:]) for w in stored)
    return lax.scan(add, jnp.zeros_like(x_PD), (runs, sizes_GE, ends_G - sizes_GE.sum(axis=1)))[0]


def _ragged(
    x_MD: Array, indices_MX: Array, weights_MX: Array, swiglu: Swiglu, E: int, rows: int, axes: tuple,
    pairs: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """`pairs`: places for what is sent, where most of the indices may be E, which is no expert; None: one for each."""
    me, S = lax.axis_index(axes), lax.axis_size(axes)
    M, X = indices_MX.shape
    order_P, place_MX, counts_E = sort_pairs(indices_MX, E)
    sent_E = counts_E
    if pairs is not None:
        order_P = order_P[:pairs]
        sent_E = jnp.diff(jnp.minimum(jnp.cumsum(counts_E), pairs), prepend=0)
    runs, kept_SE = plan_runs(lax.all_gather(sent_E, axes), rows)
    mine_SE = lax.dynamic_slice_in_dim(kept_SE, me * (E // S), E // S, axis=1)
    source_R, place_R = by_expert(mine_SE, rows)

    x_PD = gather_rows(x_MD, order_P // X, place_MX, pairs is not None)
    x_RD = send_rows(x_PD, runs, rows, axes)
    x_RD = checkpoint_name(gather_rows(x_RD, source_R, place_R[:, None]), "expert_in")
    out_RD = checkpoint_name(swiglu(x_RD, mine_SE.sum(axis=0)), "expert_out")
    out_RD = gather_rows(out_RD, place_R, source_R[:, None])
    out_PD = send_rows(out_RD, runs.back(), len(order_P), axes)
    if pairs is not None:
        out_MD = weighed_sums(out_PD, weights_MX, order_P, place_MX)
    else:
        out_MXD = gather_rows(out_PD, place_MX.reshape(-1), order_P[:, None]).reshape(M, X, -1)
        out_MD = jnp.einsum("mxd,mx->md", out_MXD.astype(weights_MX.dtype), weights_MX)
    return out_MD.astype(x_MD.dtype), (counts_E.sum() - kept_SE[me].sum()).astype(jnp.float32)


def _ring(
    x_MD: Array, indices_MX: Array, weights_MX: Array, swiglu: Swiglu, E: int, rows: int, axes: tuple,
    pairs: int | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """See `_ragged`; here pairs are sorted once they have come. Over no axes all of them are here."""
    del pairs
    me, S = (lax.axis_index(axes), lax.axis_size(axes)) if axes else (0, 1)
    X = indices_MX.shape[1]
    x_AD, indices_AX, weights_AX = (
        lax.all_gather(a, axes, tiled=True) if axes else a for a in (x_MD, indices_MX, weights_MX)
    )
    own = indices_AX - me * (E // S)
    own = jnp.where((own >= 0) & (own < E // S), own, E // S)  # experts of other shards come last
    order_P, _, counts_E = sort_pairs(own, E // S + 1)
    ends_E = jnp.minimum(jnp.cumsum(counts_E[:-1]), rows)
    sizes_E = jnp.diff(ends_E, prepend=0)
    pair_R = order_P[:rows]
    x_RD = checkpoint_name(x_AD[pair_R // X], "expert_in")
    out_RD = checkpoint_name(swiglu(x_RD, sizes_E), "expert_out")
    served = jnp.arange(len(pair_R)) < ends_E[-1]
    weight_R = jnp.where(served, weights_AX.reshape(-1)[pair_R], 0)
    weighed_RD = out_RD.astype(weight_R.dtype) * weight_R[:, None]
    out_AD = jax.ops.segment_sum(weighed_RD, pair_R // X, num_segments=len(x_AD))
    out_MD = scattered_sum(out_AD.astype(x_MD.dtype), axes, 0)
    return out_MD, (counts_E[:-1].sum() - ends_E[-1]).astype(jnp.float32)
