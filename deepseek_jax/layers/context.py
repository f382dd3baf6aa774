"""What every layer of a forward pass is told besides its input."""

import jax.numpy as jnp
from flax import struct

from deepseek_jax.kernels.attention import attention
from deepseek_jax.parallel.rules import per_shard
from deepseek_jax.types import Array


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

    A single key/value head (absorbed MLA) is shared by all devices that split the query heads.
    """
    kv_axis = "act_kv_heads" if k_BTKH.shape[2] > 1 else "none"
    ids = None if context.segment_ids is None else ("batch", "length")

    def local(q: Array, k: Array, v: Array, q_ids: Array | None, kv_ids: Array | None) -> Array:
        return attention(q, k, v, scale=scale, q_segment_ids=q_ids, kv_segment_ids=kv_ids)

    kv_names = ("batch", "length", kv_axis, "head_dim")
    q_names = ("batch", "length", "act_heads", "head_dim")
    mapped = per_shard(local, (q_names, kv_names, kv_names, ids, ids), q_names)
    return mapped(q_BTNH, k_BTKH, v_BTKV, context.segment_ids, context.segment_ids)


def valid_after_shift(valid_BT: Array, segment_ids: Array | None, shift: int) -> Array:
    """Bool [B, T]: tokens whose neighbour `shift` places on exists and lies in the same document."""
    T = valid_BT.shape[1]
    inside_T = jnp.arange(T) < T - shift
    valid = valid_BT & inside_T & jnp.roll(valid_BT, -shift, axis=1)
    if segment_ids is not None:
        valid &= segment_ids == jnp.roll(segment_ids, -shift, axis=1)
    return valid
