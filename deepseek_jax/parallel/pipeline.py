"""The pipeline over the mesh axis `stage`: which stage works on which microbatch at which tick, and what travels.

All stages run one program in step. At every tick each applies one chunk of layers to one microbatch and hands the result
to the next stage (collective-permute). With V chunks a stage (Megatron-LM's interleaved schedule, Narayanan et al.,
arXiv 2104.04473, section 2.2) chunk c lies on stage c mod S, a microbatch goes round V times, and S of them are on the way
together: stage s does at tick t, with u = t − s, chunk (u mod S·V) div S of microbatch S·(u div S·V) + u mod S. Then a
microbatch that comes round is taken up at once, and nobody keeps a queue. V = 1 is GPipe (Huang et al., arXiv 1811.06965).
The backward pass is autodiff's: the same ticks in reverse order. parallel/one_f_one_b.py has the schedule in which it begins
before the last forward pass, and keeps less.

No stage keeps the whole batch: its microbatches, and later their results, lie spread over the stages, M / S on each, and
move one stage on at a time, so that stage 0 always finds its next one at home and the last stage a free place. Microbatch m
is at home on stage m mod S, at place m div S: the S that are on the way together have one each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig, require
from deepseek_jax.parallel.bubbles import idle_share
from deepseek_jax.parallel.rules import RULES, degree, shard
from deepseek_jax.types import Array

[AXIS] = RULES["stages"]
Schedule = Literal["gpipe", "1f1b"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
StageFunction = Callable[[Any, Array, Array, Any], tuple[Array, Any]]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a piece of a batch goes through the stages of `MeshConfig.stage`."""

    microbatches: int
    """In how many parts a piece is cut; a multiple of the stages."""
    chunks: int = 1
    """Runs of layers that each stage has. 1: GPipe; more: the interleaved schedule, whose bubble is that much smaller."""
    schedule: Schedule = "gpipe"
    """When a microbatch goes back. "gpipe": after the last one's forward pass, so a stage keeps what `ModelConfig.remat` says
    of all M. "1f1b": as soon as its group of S has a loss, so a stage keeps at most 3 S − 2 of them (of V chunks fewer than
    (1.5 V + 2) S, each a V-th of a stage), and of a layer its input alone: it is worked out again whatever `remat`. The
    bubble is the same."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"Pipeline.schedule = {self.schedule!r}: must be one of {SCHEDULES}")
        for name in ("microbatches", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pipeline.{name} = {getattr(self, name)}: must be at least 1")

    def idle(self, stages: int, microbatches: int | None = None) -> float:
        """Share of the pipeline's time in which a stage has no microbatch: (S − 1) / (V · M + S − 1)."""
        return idle_share("interleaved", stages, microbatches or self.microbatches, self.chunks)

    @staticmethod
    def check_model(model: ModelConfig) -> None:
        """Whether the model asks for nothing that is not built in a pipeline.

        Raises:
            ValueError: it does.
        """
        for name, value, other in (("remat", "offload", "full"), ("gradient_sum", "float32", "compute")):
            require(
                getattr(model, name) != value, "ModelConfig", name, value,
                f"is not built in a pipeline: take {other!r}, or leave RunConfig.pipeline out",
            )  # fmt: skip

    def check_layers(self, stages: int, layers: int) -> None:
        """Whether each chunk of each stage gets a layer.

        Raises:
            ValueError: it does not.
        """
        if self.chunks * stages > layers:
            raise ValueError(
                f"Pipeline.chunks = {self.chunks} on MeshConfig.stage = {stages} is {self.chunks * stages} chunks for the "
                f"{layers} layers of the pipeline: take at most {layers} stages"
                + (f", or {layers // stages or 1} chunks" if self.chunks > 1 else "")
            )

    def check_rows(self, stages: int, rows: int, split: int) -> None:
        """Whether `rows` sequences can go through the stages, where the mesh splits each microbatch in `split` parts.

        Raises:
            ValueError: microbatches that are no multiple of the stages, do not divide the rows, or cannot be split.
        """
        M = self.microbatches
        if M % stages:
            fits = -(-M // stages) * stages
            raise ValueError(
                f"Pipeline.microbatches = {M}: must be a multiple of MeshConfig.stage = {stages}, such as {fits}: stages then "
                f"wait {self.idle(stages, fits):.0%} of the time for one another"
            )
        if rows % (M * split):
            raise ValueError(
                f"Pipeline.microbatches = {M}: a piece of {rows} sequences does not make {M} microbatches that {split} "
                f"parts of the mesh share: make batch_size / accumulation a multiple of {M * split}"
            )


def stages_of_mesh() -> int:
    """Stages of the ambient mesh; 1 without one."""
    return degree("stages")


def _names(ndim: int, *before: str) -> tuple[str, ...]:
    """Logical axes of an array [*before, rows, …], whose next dim is that of the tokens."""
    return (*before, "batch", "length", *["none"] * ndim)[:ndim]


def _before_stage() -> int:
    """Parts of the batch that are split over axes ahead of `stage` in the table."""
    axes = RULES["batch"]
    mesh = jax.sharding.get_abstract_mesh()
    result = 1
    for axis in axes[: axes.index(AXIS)]:
        result *= mesh.shape.get(axis, 1)
    return result


def cut(x: Array, microbatches: int) -> Array:
    """[B, T, …] (or [B]) -> [S, M / S, B / M, T, …], the first dim over the stages; no row leaves its device.

    Each device's rows are dealt out over the microbatches, so every microbatch has rows on every part of the batch axes.
    """
    S, A = stages_of_mesh(), _before_stage()
    K, R = microbatches // S, degree("batch") // (S * A)
    B = x.shape[0]
    parts = x.reshape(A, S, R, K, B // (A * S * R * K), *x.shape[1:])
    parts = jnp.moveaxis(parts, (1, 3), (0, 1)).reshape(S, K, B // (S * K), *x.shape[1:])
    return shard(parts, *_names(parts.ndim, "stages", "none"))


def joined(x: Array) -> Array:
    """The inverse of `cut`: [S, M / S, B / M, …] -> [B, …]."""
    S, A = stages_of_mesh(), _before_stage()
    K, rows, R = x.shape[1], x.shape[2], degree("batch") // (S * A)
    parts = x.reshape(S, K, A, R, rows // (A * R), *x.shape[3:])
    return jnp.moveaxis(parts, (0, 1), (1, 3)).reshape(S * K * rows, *x.shape[3:])


def pipelined(stage: StageFunction, pipeline: Pipeline, weights: Any, x: Array, context: Any) -> tuple[Array, Any]:
    """Every microbatch through all chunks of layers.

    Args:
        stage: `(weights, chunk, x, context) -> (x, statistics)` of one chunk of one stage: `weights` as given here without
            the stage dim, `chunk` an integer scalar, `x` [B / M, T, D], `context` the microbatch's own.
        pipeline: microbatches and chunks.
        weights: tree of [S, V, …], split over the stages.
        x: [B, T, D].
        context: tree of [B, …], without gradient.

    Returns:
        [B, T, D], and the statistics as [S, V, M, …].

    Raises:
        ValueError: see `Pipeline.check_rows`.
    """
    S, V, M = stages_of_mesh(), pipeline.chunks, pipeline.microbatches
    pipeline.check_rows(S, x.shape[0], degree("batch") // S)

    def local(number: Array, weights: Any, stream: Any) -> tuple[Array, Any]:
        s = number[0]
        weights, (x, context) = jax.tree.map(lambda leaf: leaf[0], (weights, stream))
        run = _Stage(stage, weights, s, S, V, M)
        first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), (x, context))
        carry, ticks = lax.scan(run.tick, ((x, context), first, jnp.zeros_like(x)), jnp.arange(M * V + S - 1))

        return carry[2][None], jax.tree.map(lambda leaf: in_order(leaf, s, S, V, M)[None], ticks)

    stream = jax.tree.map(lambda leaf: cut(leaf, M), (x, context))
    spec = jax.sharding.PartitionSpec(AXIS)
    mapped = jax.shard_map(local, in_specs=spec, out_specs=spec, axis_names={AXIS}, check_vma=False)
    out, statistics = mapped(jnp.arange(S), weights, stream)
    return shard(joined(out), *_names(x.ndim)), statistics


def in_order(ticks: Array, s: Array, S: int, V: int, M: int) -> Array:
    """What stage s made in the ticks of the forward pass, [M · V + S − 1, …], by chunk and microbatch: [V, M, …]."""
    own = lax.dynamic_slice_in_dim(ticks, s, M * V).reshape(M // S, V, S, *ticks.shape[1:])
    return jnp.moveaxis(own, 1, 0).reshape(V, M, *ticks.shape[1:])


@dataclass(frozen=True)
class _Stage:
    """The work of one stage, inside the shard_map; `s` is its number."""

    function: StageFunction
    weights: Any
    s: Array
    S: int
    V: int
    M: int

    def tick(self, carry: tuple[Any, Any, Array], t: Array) -> tuple[tuple[Any, Any, Array], Any]:
        """One chunk of one microbatch. Carried: the stream of microbatches, what has come in, the stream of results."""
        s, S, V = self.s, self.S, self.V
        stream, came, results = carry
        begins, place = (t % (S * V) < S) & (t < self.M * V), number(t, S, V) // S
        new, stream = taken(stream, place, begins)
        x, context = choose(begins & (s == 0), new, came)

        u = jnp.maximum(t - s, 0)
        x, statistics = self.function(self.weights, u % (S * V) // S, x, context)

        last = jnp.maximum(t - (S - 1), 0)
        ends = (t >= S - 1) & (last % (S * V) // S == V - 1)
        results = put(results, number(last, S, V) // S, x, ends)
        return (stream, send((x, context), 1), results), statistics


def taken(stream: Any, place: Array, begins: Array) -> tuple[Any, Any]:
    """What lies at a place of a stream [K, …], and the stream: where a stage takes it up, the others' move to it by one.

    After S times all are at home again.
    """
    new = read(stream, place)
    return new, write(stream, place, choose(begins, send(new, -1), new))


def put(stream: Any, place: Array, value: Any, ends: Array) -> Any:
    """A stream [K, …] in which, if `ends`, the last stage has put down `value` at a place, and the others' have moved on.

    After S times each lies at its home.
    """
    old = read(stream, place)
    moved = choose(lax.axis_index(AXIS) == stages_inside() - 1, value, send(old, -1))
    return write(stream, place, choose(ends, moved, old))


def stages_inside() -> int:
    """Stages, asked inside the shard_map over them, where `stages_of_mesh` counts them no more."""
    return lax.axis_size(AXIS)


def send(tree: Any, way: int) -> Any:
    """To the next stage, or the one before; the ends are joined."""
    S = stages_inside()
    pairs = [(i, (i + way) % S) for i in range(S)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, AXIS, pairs), tree)


def number(u: Array, S: int, V: int) -> Array:
    """The microbatch of a stage that began u ticks ago."""
    return u // (S * V) * S + u % S


def read(tree: Any, place: Array) -> Any:
    """What lies at a place of the leaves' first dim."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, place, 0, keepdims=False), tree)


def write(tree: Any, place: Array, value: Any) -> Any:
    """The leaves with `value` at a place of their first dim."""
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, place, 0), tree, value)


def choose(condition: Array, then: Any, otherwise: Any) -> Any:
    """`then` where the scalar `condition` holds, else `otherwise`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
