"""Rows that change shards: the ragged all-to-all of expert parallelism, and gathers of weights for one layer.

Everything here runs inside a `shard_map` over the axis it talks over. A ragged all-to-all sends a run of rows to every
shard and receives one from each; XLA implements it on TPU and GPU, not on CPU (jax issue 34755), where an emulation of
the same signature sends blocks of equal size, in as many rounds as the longest run needs, so that virtual devices test the
path that pods run. GPUs run the emulation too, which was eight times as fast there (docs/benchmarks.md).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from deepseek_jax import platform
from deepseek_jax.types import Array

Axes = tuple[str, ...]


@struct.dataclass
class Runs:
    """Rows that every shard s of S sends to every shard t; known to all shards. Rows lie by receiver at the sender, and
    by sender at the receiver."""

    sent_from: Array
    """Int32 [S, S]: [s, t] is where the run for t begins in the rows of s."""
    sizes: Array
    """Int32 [S, S]: its rows that are sent, what does not fit the receiver left out."""
    put_at: Array
    """Int32 [S, S]: where t puts it."""

    def back(self) -> "Runs":
        """The runs that bring all rows back to where they came from."""
        return Runs(self.put_at.T, self.sizes.T, self.sent_from.T)


def plan_runs(counts_SE: Array, rows: int) -> tuple[Runs, Array]:
    """Runs of rows that are sorted by E experts, S shards holding E / S of them each.

    Args:
        counts_SE: int32, rows of shard s for expert e.
        rows: places of every receiver. Where more are sent to one, the last of the last shards are left out.

    Returns:
        The runs, and int32 [S, E]: rows of shard s that reach expert e.
    """
    S, E = counts_SE.shape
    whole_ST = counts_SE.reshape(S, S, E // S).sum(axis=-1)
    before_ST = _exclusive(whole_ST, axis=0)
    sizes_ST = jnp.clip(rows - before_ST, 0, whole_ST)
    first_STE = _exclusive(counts_SE.reshape(S, S, E // S), axis=-1)
    kept_STE = jnp.clip(sizes_ST[..., None] - first_STE, 0, counts_SE.reshape(S, S, E // S))
    runs = Runs(_exclusive(whole_ST, axis=1), sizes_ST, jnp.minimum(before_ST, rows))
    return runs, kept_STE.reshape(S, E)


def by_expert(kept_SE: Array, rows: int) -> tuple[Array, Array]:
    """How received rows, which lie by sender and then by expert, are put in order of the experts.

    Args:
        kept_SE: int32 [S, E of this shard]: rows received from shard s for each of its experts.
        rows: places of the receiver.

    Returns:
        Int32 [rows] twice: row i of the ordered rows is row `source[i]` of the received ones, and row j of the received
        ones is row `place[j]` of the ordered ones. Places without a row keep theirs.
    """
    S, E = kept_SE.shape
    received_SE = _exclusive(kept_SE.reshape(-1), axis=0).reshape(S, E)
    ordered_SE = _exclusive(kept_SE.T.reshape(-1), axis=0).reshape(E, S).T
    places = jnp.arange(rows, dtype=jnp.int32)

    def follow(sizes: Array, begin: Array, elsewhere: Array) -> Array:
        # A place's shift is the sum of the steps between runs before it: compared and added, neither sought nor gathered.
        steps = jnp.diff(elsewhere - begin, prepend=0)
        shift = jnp.where(places[:, None] >= begin, steps, 0).sum(axis=1, dtype=jnp.int32)
        return jnp.where(places < sizes.sum(), places + shift, places)

    source = follow(kept_SE.T.reshape(-1), ordered_SE.T.reshape(-1), received_SE.T.reshape(-1))
    place = follow(kept_SE.reshape(-1), received_SE.reshape(-1), ordered_SE.reshape(-1))
    return source, place


def _exclusive(x: Array, axis: int) -> Array:
    """Sums of all elements before each one."""
    return jnp.cumsum(x, axis=axis, dtype=jnp.int32) - x


def send_rows(x_PD: Array, runs: Runs, rows: int, axes: Axes) -> Array:
    """Rows of every shard moved along `runs`; differentiable, by the way back.

    Args:
        x_PD: rows of this shard.
        runs: see `plan_runs`; the same on all shards.
        rows: places for what this shard receives.
        axes: mesh axes that the S shards lie along.

    Returns:
        [rows, D]; places that receive nothing are zero.
    """
    received: Any = _send(x_PD, runs, rows, axes)
    return received


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _send(x_PD: Array, runs: Runs, rows: int, axes: Axes) -> Array:
    me = lax.axis_index(axes)
    arguments = runs.sent_from[me], runs.sizes[me], runs.put_at[me], runs.sizes[:, me]
    return ragged_all_to_all(x_PD, jnp.zeros((rows, *x_PD.shape[1:]), x_PD.dtype), *arguments, axes=axes)


def _send_fwd(x_PD: Array, runs: Runs, rows: int, axes: Axes):
    return _send(x_PD, runs, rows, axes), (runs, x_PD[:, :0])


def _send_bwd(rows: int, axes: Axes, residuals: tuple[Runs, Array], d_RD: Array):
    del rows
    runs, like = residuals
    return _send(d_RD, runs.back(), like.shape[0], axes), None


_send.defvjp(_send_fwd, _send_bwd)

Implementation = Literal["native", "emulated"]


def ragged_all_to_all(
    operand: Array, output: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array,
    *, axes: Axes, implementation: Implementation | None = None,
) -> Array:  # fmt: skip
    """`jax.lax.ragged_all_to_all`, or its emulation where XLA has none.

    Args:
        operand: [P, …], of which `send_sizes[t]` rows from `input_offsets[t]` on go to shard t.
        output: [R, …], in which they are put at `output_offsets[t]`, an offset at the receiver; other rows stay.
        input_offsets: int32 [S], like the three that follow.
        send_sizes: see `operand`.
        output_offsets: see `output`.
        recv_sizes: rows that come from each shard.
        axes: mesh axes of the S shards.
        implementation: None takes the native one on TPUs alone.
    """
    if implementation is None:
        implementation = "native" if platform.target() == "tpu" else "emulated"
    if implementation == "native":
        return lax.ragged_all_to_all(
            operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axes
        )
    return _in_rounds(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axes)


def _in_rounds(
    operand: Array, output: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array,
    axes: Axes,
) -> Array:  # fmt: skip
    """The emulation: an all-to-all of a block of rows for every shard, until all runs have gone."""
    S = len(send_sizes)
    # No shard sends or receives more than the shorter of the two arrays holds; even runs and a quarter more go at once.
    block = min(-(-5 * min(len(operand), len(output)) // (4 * S)), len(operand))
    puts = lax.all_to_all(output_offsets, axes, 0, 0, tiled=True)
    number_SR = jnp.arange(len(output), dtype=jnp.int32) - puts[:, None]
    comes_SR = (number_SR >= 0) & (number_SR < recv_sizes[:, None])
    sender_R, number_R = jnp.argmax(comes_SR, axis=0), (number_SR * comes_SR).sum(axis=0)

    def once(i: Array | int, output: Array) -> Array:
        source_SC = input_offsets[:, None] + i * block + jnp.arange(block, dtype=jnp.int32)
        sent = operand[jnp.minimum(source_SC, len(operand) - 1)]
        came = lax.all_to_all(sent, axes, 0, 0, tiled=True).reshape(S * block, *operand.shape[1:])
        place_R = number_R - i * block
        now_R = comes_SR.any(axis=0) & (place_R >= 0) & (place_R < block)
        rows = came[jnp.where(now_R, sender_R * block + place_R, 0)]
        return jnp.where(now_R.reshape(-1, *[1] * (output.ndim - 1)), rows, output)

    longest = lax.pmax(send_sizes.max(), axes)
    return lax.fori_loop(1, -(-longest // block), once, once(0, output))


def scattered_sum(x: Array, axes: Axes, dim: int) -> Array:
    """The sum over the shards, of which each is left with its own part along `dim`; the first axis is the outermost.

    Axis by axis: over several at once, the TPU compiler makes the whole sum on every device and cuts it.
    """
    for axis in axes:
        x = lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    return x


def gather_weight(w: Array, axes: Axes, dim: int, dtype: str, *, wide_sums: bool = False) -> Array:
    """A shard's part of a weight, cast to `dtype` and joined along `dim` with those of the other shards.

    The gradient is added up over the shards as it comes, or, with `wide_sums`, in float32 or wider; each is left with the
    sum for its own part, in the dtype of `w`. What is gathered is `dtype`, never the stored precision.
    """
    whole: Any = _gather(w, axes, dim, dtype, wide_sums)
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(w: Array, axes: Axes, dim: int, dtype: str, wide_sums: bool) -> Array:
    del wide_sums
    w = w.astype(dtype)
    return lax.all_gather(w, axes, axis=dim, tiled=True) if axes else w


def _gather_fwd(w: Array, axes: Axes, dim: int, dtype: str, wide_sums: bool):
    return _gather(w, axes, dim, dtype, wide_sums), w[:0]


def _gather_bwd(axes: Axes, dim: int, dtype: str, wide_sums: bool, like: Array, d: Array):
    del dtype
    d = d.astype(jnp.promote_types(d.dtype, jnp.float32)) if wide_sums else d
    return (scattered_sum(d, axes, dim).astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)
