"""Sequences split over the mesh axis `context`: their order, and the ring in which keys and values go round.

Ring attention (Liu et al. 2023) with the zig-zag order of Llama 3 and ring-flash-attention: a sequence is cut into 2 c
chunks and shard i holds chunks i and 2 c − 1 − i. Under the causal mask a shard's early chunk sees nothing of the shards
behind it, its late chunk sees the early chunk of every other shard: each step has two products of a chunk with a chunk that
are not masked at all, on every shard.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.parallel.rules import RULES, Names, degree, shard, sharded_map

[AXIS] = RULES["length"]
Arrays = tuple[jax.Array, ...]


def check_length(tokens: int, shards: int, what: str) -> None:
    """Raises ValueError where a sequence of `tokens` cannot be split over `shards`; `what` names the length."""
    parts = 2 * shards
    if shards > 1 and tokens % parts:
        below = tokens - tokens % parts
        near = f"{below} or {below + parts}" if below else f"{parts}"
        raise ValueError(
            f"{what} = {tokens} is not a multiple of 2 × context = {parts}, the chunks of a sequence that is split over "
            f"MeshConfig.context = {shards}: the nearest lengths that work are {near}"
        )


def zigzag(x: jax.Array, *names: str) -> jax.Array:
    """`x` in the order of a split sequence, split by its logical axes `names`, "length" among them.

    For what is small (ids, masks): each device orders all of it and keeps its part, without asking the others.
    """
    shards = degree("length")
    if shards > 1:
        whole = tuple("none" if name == "length" else name for name in names)
        x = shard(ordered(shard(x, *whole), shards, names.index("length")), *whole)
    return shard(x, *names)


def ordered(x: jax.Array, shards: int, axis: int) -> jax.Array:
    """`x` with the chunks of shard 0, of shard 1 … along `axis`."""
    chunks = x.reshape(*x.shape[:axis], 2 * shards, -1, *x.shape[axis + 1 :])
    order = [j for i in range(shards) for j in (i, 2 * shards - 1 - i)]
    return jnp.take(chunks, jnp.asarray(order), axis=axis).reshape(x.shape)


def natural(x: jax.Array, *names: str) -> jax.Array:
    """The inverse of `zigzag` for an array that is split over the mesh, by two exchanges of half a shard; `names` are its
    logical axes, "length" among them."""
    shards = degree("length")
    if shards == 1:
        return x
    axis, last = names.index("length"), 2 * shards - 1
    # Each shard has one chunk of an even and one of an odd number. Chunk n belongs to shard n // 2.
    held = [(i, last - i) for i in range(shards)]
    even = [(i, chunk // 2) for i, pair in enumerate(held) for chunk in pair if chunk % 2 == 0]
    odd = [(i, chunk // 2) for i, pair in enumerate(held) for chunk in pair if chunk % 2]

    def local(part: jax.Array) -> jax.Array:
        low, high = jnp.split(part, 2, axis=axis)
        low_is_even = lax.axis_index(AXIS) % 2 == 0
        first = lax.ppermute(jnp.where(low_is_even, low, high), AXIS, even)
        second = lax.ppermute(jnp.where(low_is_even, high, low), AXIS, odd)
        return jnp.concatenate([first, second], axis=axis)

    return sharded_map(local, (names,), names)(x)


class Ring(NamedTuple):
    """What is fixed about a ring; the functions see the arrays of one shard.

    `expand(moving, fixed)` gives keys [B, S, K, H] and values [B, S, K, V]; `forward` and `backward` are those of
    `kernels.attention.blocks`, with the scale bound.
    """

    shards: int
    expand: Callable[[Arrays, Arrays], tuple[jax.Array, jax.Array]]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., Arrays]


def ring_attention(
    ring: Ring,
    q_BTNH: jax.Array,
    moving: Arrays,
    fixed: Arrays,
    segment_ids: jax.Array | None,
    names: tuple[Names, Sequence[Names], Sequence[Names]],
) -> jax.Array:
    """Causal attention of sequences that lie in zig-zag order over the ambient mesh: [B, T, N, V] in the dtype of `q_BTNH`.

    Args:
        ring: see there.
        q_BTNH: queries.
        moving: arrays [B, T, …] that go round, from which `ring.expand` makes keys and values on each shard.
        fixed: what it takes besides; every shard has its own.
        segment_ids: int32 [B, T], 0 is padding; they go round too. None: one document a row.
        names: logical axes of the queries (and the output), of each of `moving`, and of each of `fixed`.
    """
    ids = () if segment_ids is None else (segment_ids,)
    begin_fixed = len(moving)
    begin_ids = begin_fixed + len(fixed)

    def local(q: jax.Array, *others: jax.Array) -> jax.Array:
        return _attend(ring, q, others[:begin_fixed], others[begin_fixed:begin_ids], others[begin_ids:])

    in_names = (names[0], *names[1], *names[2], *[("batch", "length")] * len(ids))
    return sharded_map(local, in_names, names[0])(q_BTNH, *moving, *fixed, *ids)


def _next(tree: Any, shards: int) -> Any:
    """Every shard's arrays, handed to the shard after it."""
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % shards) for i in range(shards)]), tree)


def _half(x: jax.Array, late: int | jax.Array, axis: int = 1) -> jax.Array:
    """The early or the late chunk of a shard."""
    size = x.shape[axis] // 2
    return lax.dynamic_slice_in_dim(x, late * size, size, axis)


def _add_half(x: jax.Array, part: jax.Array, late: int | jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, _half(x, late) + part, late * part.shape[1], 1)


def _two(x: jax.Array, first: int, second: jax.Array, axis: int = 1) -> jax.Array:
    """Two chunks of a shard as one batch of twice the rows."""
    return jnp.concatenate([_half(x, first, axis), _half(x, second, axis)])


def _second(s: jax.Array) -> jax.Array:
    """Which chunks, 0 early and 1 late, of queries and of keys make the second product of step `s`.

    The first is always the late chunk here with the early one there, of shard i − s. Where that shard lies before this one,
    both chunks here see its early chunk; where the count went round, the late chunk here sees both chunks there.
    """
    return jnp.where(s <= lax.axis_index(AXIS), 0, 1)


def _masks(ids: Arrays, moving_ids: Arrays, second: jax.Array) -> dict[str, Any]:
    segments = (_two(ids[0], 1, second), _two(moving_ids[0], 0, second)) if ids else (None, None)
    return dict(q_segment_ids=segments[0], kv_segment_ids=segments[1], causal=False)


def _own(ids: Arrays) -> dict[str, Any]:
    # Chunks i and 2 c − 1 − i in this order: the order of places here is that of the sequence, so masks by place are right.
    return dict(q_segment_ids=ids[0] if ids else None, kv_segment_ids=ids[0] if ids else None, causal=True)


def _joined(out: jax.Array, lse: jax.Array, part: jax.Array, part_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of keys from that to each: [B, T, N, V] and [B, N, T]."""
    highest = jnp.maximum(lse, part_lse)
    highest = jnp.where(jnp.isneginf(highest), 0, highest)
    shares = jnp.exp(lse - highest), jnp.exp(part_lse - highest)
    total = shares[0] + shares[1]
    safe = jnp.where(total == 0, 1, total)
    first, second = ((share / safe).swapaxes(1, 2)[..., None] for share in shares)
    return out * first + part * second, jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe))


def _forward(ring: Ring, q: jax.Array, moving: Arrays, fixed: Arrays, ids: Arrays) -> tuple[jax.Array, jax.Array]:
    out, lse = ring.forward(q, *ring.expand(moving, fixed), **_own(ids))

    def step(carry: Any, s: jax.Array) -> tuple[Any, None]:
        moving, moving_ids, out, lse = carry
        following = _next((moving, moving_ids), ring.shards)  # under way while these are worked on
        second = _second(s)
        k, v = ring.expand(tuple(_two(x, 0, second) for x in moving), fixed)
        parts, parts_lse = ring.forward(_two(q, 1, second), k, v, **_masks(ids, moving_ids, second))
        for late, part, part_lse in zip((1, second), jnp.split(parts, 2), jnp.split(parts_lse, 2), strict=True):
            new, new_lse = _joined(_half(out, late), _half(lse, late, 2), part, part_lse)
            out = lax.dynamic_update_slice_in_dim(out, new, late * new.shape[1], 1)
            lse = lax.dynamic_update_slice_in_dim(lse, new_lse, late * new.shape[1], 2)
        return (*following, out, lse), None

    start = (*_next((moving, ids), ring.shards), out, lse)
    _, _, out, lse = lax.scan(step, start, jnp.arange(1, ring.shards))[0]
    return out.astype(q.dtype), jnp.where(jnp.isneginf(lse), 0, lse)


def _attend_fwd(ring: Ring, q: jax.Array, moving: Arrays, fixed: Arrays, ids: Arrays):
    out, lse = _forward(ring, q, moving, fixed, ids)
    # Named as the kernels of whole sequences name theirs: what a recomputation may keep.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention_lse")
    return out, (q, moving, fixed, ids, out, lse)


def _attend_bwd(ring: Ring, residuals: Any, d_out: jax.Array):
    q, moving, fixed, ids, out, lse = residuals
    wide = lse.dtype

    def part(moving: Arrays, *args: jax.Array, **masks: Any) -> tuple[jax.Array, Arrays, Arrays]:
        """Gradients by queries, by what moves and by what is fixed, of attention to these keys."""
        (k, v), pull = jax.vjp(ring.expand, moving, fixed)
        dq, dk, dv = ring.backward(args[0], k, v, *args[1:], **masks)
        return dq, *jax.tree.map(lambda x: x.astype(wide), pull((dk.astype(k.dtype), dv.astype(v.dtype))))

    def step(carry: Any, s: jax.Array) -> tuple[Any, None]:
        moving, moving_ids, d_moving, dq, d_fixed = carry
        following = _next((moving, moving_ids), ring.shards)
        d_moving = _next(d_moving, ring.shards)  # so far, without this shard's part: nothing here waits for it
        second = _second(s)
        dq_parts, d_chunks, d_weights = part(
            tuple(_two(x, 0, second) for x in moving),
            _two(q, 1, second), _two(out, 1, second), _two(lse, 1, second, 2), _two(d_out, 1, second),
            **_masks(ids, moving_ids, second),
        )  # fmt: skip
        for late, dq_part in zip((1, second), jnp.split(dq_parts, 2), strict=True):
            dq = _add_half(dq, dq_part, late)
        for late, of in zip((0, second), zip(*(jnp.split(d, 2) for d in d_chunks), strict=True), strict=True):
            d_moving = tuple(_add_half(total, d, late) for total, d in zip(d_moving, of, strict=True))
        return (*following, d_moving, dq, jax.tree.map(jnp.add, d_fixed, d_weights)), None

    dq, d_moving, d_fixed = part(moving, q, out, lse, d_out, **_own(ids))
    start = (*_next((moving, ids), ring.shards), d_moving, dq, d_fixed)
    _, _, d_moving, dq, d_fixed = lax.scan(step, start, jnp.arange(1, ring.shards))[0]
    d_moving = _next(d_moving, ring.shards)  # and home
    cast = [
        tuple(d.astype(x.dtype) for d, x in zip(ds, xs, strict=True))
        for ds, xs in ((d_moving, moving), (d_fixed, fixed))
    ]
    return dq.astype(q.dtype), *cast, tuple(None for _ in ids)


_attend = jax.custom_vjp(
    lambda ring, q, moving, fixed, ids: _forward(ring, q, moving, fixed, ids)[0], nondiff_argnums=(0,)
)
_attend.defvjp(_attend_fwd, _attend_bwd)
