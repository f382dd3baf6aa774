"""One forward, one backward (1F1B): the pipeline whose backward pass begins before the forward pass has ended.

PipeDream-Flush, with chunks Megatron-LM's interleaved 1F1B (Narayanan et al., arXiv 2104.04473, section 2.2). Forward passes
run as in parallel/pipeline.py: chunk q of microbatch m at tick S·V·(m div S) + (q div S)·S + m mod S + q mod S, on stage
q mod S. Backward passes mirror them, S·V + S − 2 ticks later: S·V·(m div S) + (S·V − 1 − q) div S·S + m mod S +
(S·V − 1 − q) mod S. In between lies the tail, all that follows the layers up to the loss. All stages work in step, so a
tail at every tick would be every stage's time for one microbatch; a group of S microbatches leaves the last stage in S
ticks in a row, is dealt out, one to each stage, and every stage works off the tail of its own. That is what the S − 1 ticks
more than the least are for.

So a step is S·V + S − 1 ticks of a forward chunk; for each group but the last a tail and S·V ticks of a backward and a
forward chunk; a tail and S·V + S − 1 ticks of a backward chunk. Of both there are V·M + S − 1, as in the interleaved
schedule, and the bubble is the same. A stage keeps what its backward chunk needs from the one tick to the other, at most
3 S − 2 microbatches where V is 1, however many there are.

The gradient is worked out with the loss: there is nothing here for autodiff to go back through.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.parallel.pipeline import (
    AXIS,
    Pipeline,
    choose,
    cut,
    in_order,
    joined,
    number,
    put,
    read,
    send,
    stages_of_mesh,
    taken,
    write,
)  # fmt: skip
from deepseek_jax.parallel.rules import degree
from deepseek_jax.types import Array


class Work(NamedTuple):
    """What a stage does in a tick. Weights are without the stage dim, `v` is the number of its chunk."""

    forward: Callable[[Any, Array, Array, Any, Any, Array], tuple[Array, Any, Any]]
    """`(weights, v, x, context, kept, place) -> (x, kept, statistics)`; `kept` has at `place` what `backward` wants."""
    backward: Callable[[Any, Array, Any, Any, Array, Array, Array, Any], tuple[Array, Any]]
    """`(weights, v, context, kept, place, d, active, sums) -> (d, sums)`: the gradient of x, and of the weights added to
    `sums`. `active` is 1, or 0 where the stage has no microbatch and `d` is 0."""
    tail: Callable[[Any, Array, Any, Any, Any, Any], tuple[Array, Any]]
    """`(tail weights, x, context, inputs, constants, shared) -> (scalar, more)` of one microbatch; x is the layers' result."""


class Given(NamedTuple):
    """Arrays that go through the pipeline."""

    weights: Any
    """Tree of [S, V, …], split over the stages."""
    tail_weights: Any
    """Tree, the same on all stages."""
    x: Array
    """[B, T, D]."""
    context: Any
    """Tree of [B, …], for layers and tail, without gradient."""
    inputs: Any
    """Tree of [B, …], for the tail, with gradient."""
    constants: Any
    """Tree of [B, …], for the tail, without gradient."""
    shared: Any
    """Tree, the same for all microbatches, for the tail, without gradient."""


class Sums(NamedTuple):
    """Gradients of the tail's scalars, added up over microbatches, and of what is not a weight."""

    weights: Any
    """Tree of [S, V, …]."""
    tail_weights: Any
    """Tree of [S, …]: each stage's part of the sum."""
    x: Array
    """[B, T, D]."""
    inputs: Any
    """Tree of [B, …]."""


class _Carry(NamedTuple):
    """What a stage has between ticks."""

    stream: tuple[Array, Any]
    """Microbatches [M / S, …] and their contexts; where x was taken up, its gradient is put down."""
    inputs: Any
    """Of the tail, [M / S, …]; then their gradients."""
    came: tuple[Array, Any]
    """From the stage before."""
    d_came: Array
    """From the stage behind."""
    leaving: Array
    """A result on its way from the last stage to the stage that works off its tail."""
    d_leaving: Array
    """Its gradient on the way back."""
    contexts: Any
    """Of the microbatches that are kept, [places, …]."""
    kept: Any
    sums: Any
    tail_sums: Any


def places(stages: int, chunks: int) -> list[int]:
    """How many microbatches a stage keeps of each of its chunks.

    Chunk v of stage 0 waits longest: it is kept for (2 (V − v) + 1) S − 2 ticks, and has S microbatches in every S · V.
    """
    S, V = stages, chunks
    ticks = [(2 * (V - v) + 1) * S - 2 for v in range(V)]
    return [t // (S * V) * S + min(S, t % (S * V)) for t in ticks]


def place(v: Array | int, m: Array | int, stages: int, chunks: int) -> Array:
    """Where a stage keeps microbatch m of its chunk v."""
    count = places(stages, chunks)
    first = [sum(count[:i]) for i in range(chunks)]
    return jnp.array(first)[v] + m % jnp.array(count)[v]


def one_f_one_b(
    work: Work, pipeline: Pipeline, given: Given, kept: Any, sums: Any, tail_sums: Any
) -> tuple[Array, Any, Any, Sums]:
    """Sum of the tails' scalars over the microbatches, and its gradient.

    Args:
        work: what stages do.
        pipeline: microbatches and chunks.
        given: what goes in.
        kept: zeros [S, places, …], as many places as `places` gives in all, for what `work.forward` keeps.
        sums: zeros [S, V, …] for `work.backward`.
        tail_sums: zeros [S, …] in the shapes of the tail's weights.

    Returns:
        The sum, what else the tails give as [M, …], the statistics as [S, V, M, …], and gradients in the dtypes of what
        they are added to.

    Raises:
        ValueError: see `Pipeline.check_rows`.
    """
    S, V, M = stages_of_mesh(), pipeline.chunks, pipeline.microbatches
    pipeline.check_rows(S, given.x.shape[0], degree("batch") // S)

    def local(stage_number: Array, given: Given, shared: tuple[Any, Any], buffers: Any) -> Any:
        tail_weights, given_shared = shared
        given, (kept, sums, tail_sums) = jax.tree.map(lambda leaf: leaf[0], (given, buffers))
        given = given._replace(tail_weights=tail_weights, shared=given_shared)
        stage = _Stage(work, given, stage_number[0], S, V, M)
        none, context = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), (given.x, given.context))
        contexts = jax.tree.map(lambda leaf: jnp.zeros((sum(places(S, V)), *leaf.shape), leaf.dtype), context)
        carry = _Carry(
            (given.x, given.context), given.inputs, (none, context), none, none, none, contexts, kept, sums, tail_sums
        )
        carry, total, tails, statistics = stage.step(carry)
        gradients = carry.sums, carry.tail_sums, carry.stream[0], carry.inputs
        statistics = jax.tree.map(lambda leaf: in_order(leaf, stage_number[0], S, V, M), statistics)
        return jax.tree.map(lambda leaf: leaf[None], (total, tails, statistics, gradients))

    def stream(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: cut(leaf, M), tree)

    split = given._replace(
        x=stream(given.x), context=stream(given.context), inputs=stream(given.inputs),
        constants=stream(given.constants), tail_weights=None, shared=None,
    )  # fmt: skip
    spec = jax.sharding.PartitionSpec(AXIS)
    mapped = jax.shard_map(
        local, in_specs=(spec, spec, jax.sharding.PartitionSpec(), spec), out_specs=spec, axis_names={AXIS},
        check_vma=False,
    )  # fmt: skip
    buffers = (kept, sums, tail_sums)
    total, tails, statistics, out = mapped(jnp.arange(S), split, (given.tail_weights, given.shared), buffers)
    tails = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1).reshape(M, *leaf.shape[2:]), tails)
    weights, tail_weights, x, inputs = out
    return total.sum(), tails, statistics, Sums(weights, tail_weights, joined(x), jax.tree.map(joined, inputs))


@dataclass(frozen=True)
class _Stage:
    """The work of one stage, inside the shard_map; `s` is its number."""

    work: Work
    given: Given
    s: Array
    S: int
    V: int
    M: int

    def step(self, carry: _Carry) -> tuple[_Carry, Array, Any, Any]:
        """All ticks: the carry, the sum of this stage's tails, what else they gave [M / S, …], the statistics by tick."""
        period, groups = self.S * self.V, self.M // self.S
        lag = period + self.S - 2  # in which the first group goes forward, before its tail
        carry, first = lax.scan(self.forward, carry, jnp.arange(lag + 1))

        def group(carry: _Carry, p: Array) -> tuple[_Carry, Any]:
            carry, tail = self.tail(carry, p)
            carry, statistics = lax.scan(self.both, carry, lag + p * period + jnp.arange(period))
            return carry, (tail, statistics)

        statistics, tails = [first], []
        if groups > 1:
            carry, (tail, later) = lax.scan(group, carry, jnp.arange(groups - 1))
            statistics.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), later))
            tails.append(tail)
        carry, tail = self.tail(carry, jnp.array(groups - 1))
        tails.append(jax.tree.map(lambda leaf: leaf[None], tail))
        begin = lag + (groups - 1) * period
        carry, _ = lax.scan(lambda carry, t: (self.backward(carry, t), None), carry, begin + jnp.arange(lag + 1))
        total, more = _end_to_end(tails)
        return carry, total.sum(), more, _end_to_end(statistics)

    def both(self, carry: _Carry, t: Array) -> tuple[_Carry, Any]:
        """A tick's backward chunk and the next tick's forward chunk."""
        return self.forward(self.backward(carry, t), t + 1)

    def forward(self, carry: _Carry, t: Array) -> tuple[_Carry, Any]:
        """The forward chunk of tick t, and its statistics."""
        s, S, V = self.s, self.S, self.V
        begins = (t % (S * V) < S) & (t < self.M * V)
        new, stream = taken(carry.stream, number(t, S, V) // S, begins)
        x, context = choose(begins & (s == 0), new, carry.came)

        # A stage that has nothing yet, or no more, works as if the batch went on: nobody misses what it overwrites.
        u = jnp.maximum(t - s, 0)
        v = u % (S * V) // S
        kept_at = place(v, number(u, S, V), S, V)
        x, kept, statistics = self.work.forward(self.given.weights, v, x, context, carry.kept, kept_at)

        last = t - (S - 1)
        ends = (last >= 0) & (last % (S * V) // S == V - 1)
        leaving = choose(ends, choose(s == S - 1, x, send(carry.leaving, -1)), carry.leaving)
        carry = carry._replace(
            stream=stream, came=send((x, context), 1), leaving=leaving, kept=kept,
            contexts=write(carry.contexts, kept_at, context),
        )  # fmt: skip
        return carry, statistics

    def backward(self, carry: _Carry, t: Array) -> _Carry:
        """The backward chunk of tick t."""
        s, S, V, M = self.s, self.S, self.V, self.M
        w = t - (S * V + S - 2)  # as if ticks began with the first tail
        begins = (w % (S * V) < S) & (w < M * V)
        new, d_leaving = carry.d_leaving, choose(begins, send(carry.d_leaving, -1), carry.d_leaving)
        d = choose(begins & (s == S - 1), new, carry.d_came)

        u = w - (S - 1 - s)
        active, u = (u >= 0) & (u < M * V), jnp.clip(u, 0, M * V - 1)
        v = V - 1 - u % (S * V) // S
        kept_at = place(v, number(u, S, V), S, V)
        context, d = read(carry.contexts, kept_at), jnp.where(active, d, 0)
        d, sums = self.work.backward(self.given.weights, v, context, carry.kept, kept_at, d, active, carry.sums)

        first = jnp.maximum(w - (S - 1), 0)
        d_came, ends = send(d, -1), (w >= S - 1) & (first % (S * V) // S == V - 1)
        x, contexts = carry.stream
        x = put(x, number(first, S, V) // S, d_came, ends)
        return carry._replace(stream=(x, contexts), d_came=d_came, d_leaving=d_leaving, sums=sums)

    def tail(self, carry: _Carry, p: Array) -> tuple[_Carry, tuple[Array, Any]]:
        """The tail of this stage's microbatch of group p."""
        _, contexts = carry.stream
        context, inputs, constants = read((contexts, carry.inputs, self.given.constants), p)

        def run(weights: Any, x: Array, inputs: Any) -> tuple[Array, Any]:
            return self.work.tail(weights, x, context, inputs, constants, self.given.shared)

        # Widened, so that gradients come in the dtype that they are summed in; layers cast them back.
        weights = jax.tree.map(lambda w, sum_: w.astype(sum_.dtype), self.given.tail_weights, carry.tail_sums)
        value_and_grad = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
        (total, more), (d_weights, d_x, d_inputs) = value_and_grad(weights, carry.leaving, inputs)
        carry = carry._replace(
            tail_sums=jax.tree.map(jnp.add, carry.tail_sums, d_weights),
            inputs=write(carry.inputs, p, d_inputs),
            d_leaving=send(d_x, -1),  # the first of the group to the last stage
        )
        return carry, (total, more)


def _end_to_end(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
