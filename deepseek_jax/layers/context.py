"""What every layer of a forward pass is told besides its input."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import struct

from deepseek_jax.kernels.attention import attention, blocks
from deepseek_jax.parallel.ring import Ring, ring_attention
from deepseek_jax.parallel.rules import degree, per_shard, shard
from deepseek_jax.types import Array

_HEADS = ("batch", "length", "act_heads", "head_dim")


@struct.dataclass
class Context:
    """Shared by all layers; made once by the model."""

    cos: Array
    """[B, T, R / 2] of the rotary angles, R the rotated dims of a head."""
    sin: Array
    """[B, T, R / 2]."""
    segment_ids: Array | None
    """Int32 [B, T], 0 for padding; None: one document a row, no padding."""
    valid: Array
    """Bool [B, T]: tokens that count in loads and balance losses."""
    exempt: Array | None
    """Bool [B]: sequences of which no token is dropped; None: nothing is dropped (evaluation)."""
    positions: Array | None = None
    """Int32 [B, T]: places of the tokens in the cache, where there is one; past its end for padding."""
    fresh: bool = struct.field(pytree_node=False, default=False)
    """Nothing is cached yet: the tokens see one another alone, by the kernels that train."""


def attend(q_BTNH: Array, k_BTKH: Array, v_BTKV: Array, context: Context, scale: float) -> Array:
    """Causal attention of a layer, each device on its own sequences and heads: [B, T, N, V].

    A single key/value head is shared by all devices that split the query heads. Where the mesh splits sequences, keys and
    values go round.
    """
    kv_names = ("batch", "length", "act_kv_heads" if k_BTKH.shape[2] > 1 else "none", "head_dim")
    if degree("length") > 1:
        ring = _ring(lambda moving, _: (moving[0], moving[1]), scale)
        names = (_HEADS, (kv_names, kv_names), ())
        return ring_attention(ring, q_BTNH, (k_BTKH, v_BTKV), (), context.segment_ids, names)
    ids = None if context.segment_ids is None else ("batch", "length")

    def local(q: Array, k: Array, v: Array, q_ids: Array | None, kv_ids: Array | None) -> Array:
        return attention(q, k, v, scale=scale, q_segment_ids=q_ids, kv_segment_ids=kv_ids)

    mapped = per_shard(local, (_HEADS, kv_names, kv_names, ids, ids), _HEADS)
    return mapped(q_BTNH, k_BTKH, v_BTKV, context.segment_ids, context.segment_ids)


def attend_latent(
    q_BTNH: Array,
    c_kv_BTC: Array,
    k_rope_BTR: Array,
    weights: tuple[Array, ...],
    expand: Callable[..., tuple[Array, Array]],
    context: Context,
    scale: float,
) -> Array:
    """`attend` with keys and values made from a latent: where the mesh splits sequences, latent and rotated key go round.

    Args:
        q_BTNH: queries.
        c_kv_BTC: normalised key/value latent.
        k_rope_BTR: rotated key.
        weights: [C, N, …] each, what `expand` multiplies the latent by.
        expand: (c_kv, k_rope, *weights) -> keys [B, T, K, H] and values [B, T, K, V], of all heads or of a device's.
        context: masks of the forward pass.
        scale: of the softmax.
    """
    if degree("length") == 1:
        k, v = expand(c_kv_BTC, k_rope_BTR, *weights)
        if k.shape[2] > 1:
            k, v = shard(k, *_HEADS), shard(v, *_HEADS)
        return attend(q_BTNH, k, v, context, scale)
    ring = _ring(lambda moving, fixed: expand(*moving, *fixed), scale)
    names = (_HEADS, (("batch", "length", "none"),) * 2, (("none", "act_heads", "head_dim"),) * len(weights))
    return ring_attention(ring, q_BTNH, (c_kv_BTC, k_rope_BTR), weights, context.segment_ids, names)


def _ring(expand: Callable[..., tuple[Array, Array]], scale: float) -> Ring:
    return Ring(
        degree("length"), expand, partial(blocks.forward, scale=scale), partial(blocks.backward, scale=scale)
    )  # fmt: skip


def valid_after_shift(valid_BT: Array, segment_ids: Array | None, shift: int) -> Array:
    """Bool [B, T]: tokens whose neighbour `shift` places on exists and lies in the same document."""
    T = valid_BT.shape[1]
    inside_T = jnp.arange(T) < T - shift
    valid = valid_BT & inside_T & jnp.roll(valid_BT, -shift, axis=1)
    if segment_ids is not None:
        valid &= segment_ids == jnp.roll(segment_ids, -shift, axis=1)
    return valid
