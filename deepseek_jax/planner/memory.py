"""Bytes of one device, buffer by buffer, and when each exists. Arithmetic alone: no array is made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from deepseek_jax.config import MoE
from deepseek_jax.layers.cache import cache_shapes
from deepseek_jax.planner.activations import ITEM, Tensor, layer_tensors, saved
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.planner.shapes import STACKS, Leaf, leaves, stored, used

PHASES = ("forward", "loss", "backward", "update")


@dataclass(frozen=True)
class Buffer:
    """Something in a device's memory."""

    name: str
    part: str
    """What it is: parameters, optimizer, gradients, activations, …"""
    bytes: int
    phases: tuple[str, ...] = PHASES
    """When it is there."""
    on_host: bool = False
    """Whether it lies in the memory of the device's host."""


@dataclass(frozen=True)
class Memory:
    """All buffers of a device."""

    buffers: tuple[Buffer, ...]

    def during(self, phase: str) -> int:
        return sum(buffer.bytes for buffer in self._there(phase))

    def _there(self, phase: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers if phase in buffer.phases and not buffer.on_host]

    @property
    def host(self) -> int:
        """Bytes of the host's memory for this device."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.on_host)

    @property
    def phase(self) -> str:
        """When most is needed."""
        return max(PHASES, key=self.during)

    @property
    def peak(self) -> int:
        return self.during(self.phase)

    @property
    def by_part(self) -> dict[str, int]:
        """Bytes at the peak, by part, most first."""
        found: dict[str, int] = {}
        for buffer in self._there(self.phase):
            if buffer.bytes:
                found[buffer.part] = found.get(buffer.part, 0) + buffer.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def largest(self, count: int = 8) -> list[Buffer]:
        """The largest buffers at the peak."""
        return sorted(self._there(self.phase), key=lambda b: -b.bytes)[:count]


def memory_of(request: PlanRequest) -> Memory:
    """What a device of the request needs."""
    if request.trains:
        return Memory(tuple(_training(request)))
    return Memory(tuple(_serving(request)))


def _by_part(found: Iterable[Leaf], bytes_of) -> dict[str, int]:
    total: dict[str, float] = {}
    for leaf in found:
        total[leaf.part] = total.get(leaf.part, 0) + bytes_of(leaf)
    return {part: int(count) for part, count in total.items()}


def trained(request: PlanRequest) -> tuple[Leaf, ...]:
    """The leaves of the model: GRPO leaves multi-token modules out."""
    return tuple(leaf for leaf in leaves(request.model) if request.step == "train" or leaf.stack != "mtp")


def times_used(request: PlanRequest, leaf: Leaf) -> int:
    """Layers of a leaf that a device takes in a forward pass: all, or those of a pipeline's chunk in each tick."""
    piped = leaf.stack is not None and leaf.stack == request.piped_stack
    return request.pipeline_ticks * request.layers_of_a_chunk if piped else leaf.layers


def _training(request: PlanRequest) -> Iterable[Buffer]:
    run, degrees = request.run, request.degrees
    model = run.model
    param = ITEM[model.param_dtype]
    wide = max(param, 4)  # gradients and moments are float32, or float64 where parameters are
    moment = wide if run.optimizer.moment_dtype == "float32" else 2
    found = trained(request)

    def all_of(itemsize: int, found: Iterable[Leaf] = found) -> dict[str, int]:
        return _by_part(found, lambda leaf: stored(leaf, degrees) * itemsize)

    for part, size in all_of(param).items():
        yield Buffer(f"parameters: {part}", "parameters", size)
    for part, size in all_of(2 * moment).items():
        yield Buffer(f"moments: {part}", "optimizer", size, on_host=request.moments_at_host)
    if run.ema_decay is not None and request.step == "train":
        yield Buffer("running mean of the weights", "running mean", sum(all_of(wide).values()))
    if request.step == "grpo":
        yield Buffer("reference", "reference", sum(all_of(param).values()))
    if isinstance(model.ffn, MoE) and model.ffn.topk_method == "noaux_tc":
        layers = model.num_moe_layers + model.num_nextn_predict_layers
        yield Buffer("selection bias", "parameters", 4 * layers * model.ffn.n_routed_experts)
    piped = [leaf for leaf in found if leaf.stack and leaf.stack == request.piped_stack]
    yield from _gradients(request, all_of(wide, [leaf for leaf in found if leaf not in piped]), all_of(wide, piped))
    yield from _stage(request, found, wide)
    yield from _activations(request)
    yield from _layer(request, found)
    yield from _loss(request)


def _gradients(request: PlanRequest, parts: dict[str, int], piped: dict[str, int]) -> Iterable[Buffer]:
    """`piped`: of a pipeline's layers, which come to where they are stored when the stages have added them up."""
    several = request.run.accumulation > 1
    for found, when in ((parts, ("backward", "update")), (piped, ("update",))):
        for part, size in found.items():
            yield Buffer(f"gradients: {part}", "gradients", size, PHASES if several else when)
    if several:
        yield Buffer("gradients of one piece", "gradients", sum(parts.values()), ("backward",))


def _stage(request: PlanRequest, found: tuple[Leaf, ...], wide: int) -> Iterable[Buffer]:
    """What a pipeline's stage holds of its layers beside the stored shards: a copy to compute with, its gradient. In 1F1B
    also of what follows them, on every stage, and gradients from the first loss on."""
    stages, item = request.degrees["stage"], ITEM[request.model.dtype]
    if request.piped_stack is None:
        return
    count = sum(_filled(request, leaf) for leaf in found if leaf.stack == request.piped_stack)
    when = ("loss", "backward") if request.one_f_one_b else ("backward",)
    yield Buffer("layers of a stage", "weights in use", count * item, PHASES[:3])
    yield Buffer("gradients of the layers of a stage", "gradients", count * wide, when)
    if request.one_f_one_b:
        head = head_of(request)
        behind = [leaf for leaf in found if leaf.stack == "mtp" or leaf is head]
        count = stages * sum(stored(leaf, request.degrees) for leaf in behind)
        yield Buffer("head and multi-token modules of all stages", "weights in use", count * item, PHASES[:3])
        yield Buffer("their gradients", "gradients", count * wide, when)


def _filled(request: PlanRequest, leaf: Leaf) -> int:
    """Numbers of a leaf of the pipeline on one device, empty layers too."""
    return stored(leaf, request.degrees) * (leaf.layers + request.empty_layers) // leaf.layers


def _stacks(request: PlanRequest) -> list[tuple[str, int, bool]]:
    """(name, layers, with experts) of each loop over layers."""
    model = request.model
    moe = isinstance(model.ffn, MoE)
    mtp = model.num_nextn_predict_layers if request.step == "train" else 0
    counts = zip(STACKS, (model.num_dense_layers, model.num_moe_layers, mtp), (False, True, moe), strict=True)
    return [(name, layers, has) for name, layers, has in counts if layers]


def _activations(request: PlanRequest) -> Iterable[Buffer]:
    item, tokens = ITEM[request.model.dtype], request.rows * request.length
    for name, layers, moe in _stacks(request):
        share = request.rows_kept(name) / request.rows
        for tensor in saved(request, layer_tensors(request, moe), name):
            part = "saved expert rows" if tensor.expert else "saved activations"
            when = ("forward", "loss", "backward")
            size = int(request.computed_layers(name, layers) * tensor.bytes * share)
            yield Buffer(
                f"{tensor.name} of {layers} {name}", part, size, when, on_host=request.model.remat == "offload"
            )
    width = request.model.hidden_size
    yield Buffer("hidden states at the ends", "saved activations", int(3 * tokens * width * item), PHASES[:3])


def _layer(request: PlanRequest, found: tuple[Leaf, ...]) -> Iterable[Buffer]:
    """What the largest layer needs while it runs: its gathered weights, their gradients, its intermediates."""
    model, degrees = request.model, request.degrees
    compute = ITEM[model.dtype]

    def gathered(stack: str) -> list[int]:
        return [
            used(leaf, degrees) * compute // (model.expert_gather_parts if leaf.routed else 1)
            for leaf in found
            if leaf.stack == stack and not leaf.wide
        ]

    stacks = _stacks(request)
    if model.dtype != model.param_dtype:
        # The compiler takes the cast out of the loop over layers: a copy of every shard, from the forward pass on. Those of
        # a pipeline go to their stages at once.
        loops = {name for name, _, _ in stacks} - {request.piped_stack}
        cast = sum(stored(leaf, degrees) for leaf in found if leaf.stack in loops and not leaf.wide) * compute
        yield Buffer("stored weights in the compute dtype", "weights in use", cast, PHASES[:3])
    if request.topology.devices > 1:
        weights = max((sum(gathered(name)) for name, _, _ in stacks), default=0)
        yield Buffer("gathered weights of one layer", "weights in use", weights, ("forward", "backward"))
        one = max((max(gathered(name)) for name, _, _ in stacks), default=0)
        sums = max(compute, 4) if model.wide_sums else compute
        yield Buffer("gradient of one gathered weight", "weights in use", one * sums // compute, ("backward",))
    else:
        one = max((max(gathered(name)) for name, _, _ in stacks), default=0)
        yield Buffer("weights of one layer in the compute dtype", "weights in use", one, ("forward", "backward"))
    works = []
    for name, _, moe in stacks:
        share = request.rows_in_use(name) / request.rows
        works.append(([replace(t, bytes=t.bytes * share) for t in layer_tensors(request, moe)], name))
    largest, stack = max(works, key=lambda work: sum(t.bytes for t in work[0]))
    again = [t for t in largest if t.read and t not in saved(request, largest, stack)]
    yield from _work("recomputed", again)
    yield from _work("gradients of", _cotangents(largest))


def _cotangents(tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of intermediates that exist at once: of the attention's or of the feed-forward's, whichever are more."""
    attention = [
        t for t in tensors if t.name in ("q_rotated", "k_rotated", "k_written_out", "v_written_out", "v", "attention")
    ]
    ffn = [t for t in tensors if t.name in ("expert_in", "expert_gate", "expert_up", "ffn_gate", "ffn_up")]
    return max((attention, ffn), key=lambda some: sum(t.bytes for t in some))


def _work(what: str, tensors: list[Tensor]) -> Iterable[Buffer]:
    for tensor in tensors:
        part = "expert rows in use" if tensor.expert else "activations in use"
        yield Buffer(f"{what} {tensor.name}", part, int(tensor.bytes), ("backward",))


def _loss(request: PlanRequest) -> Iterable[Buffer]:
    model, degrees = request.model, request.degrees
    chunk = min(max(request.run.loss_chunk // request.split("length"), 1), request.length)
    words = model.vocab_size / request.split("act_vocab")
    logits = request.rows_in_use(None) * chunk * words * 4
    yield Buffer("logits of a chunk", "loss", int(logits), ("loss",))
    yield Buffer("their probabilities and gradients", "loss", int(1.5 * logits), ("loss",))
    whole = used(head_of(request), degrees)
    several = request.topology.devices > 1
    # Compiled programs hold what is gathered, and what is added up, once more on its way; the latter for every depth.
    depths = 1 + (model.num_nextn_predict_layers if request.step == "train" else 0)
    yield Buffer("gathered head", "loss", (1 + several) * whole * ITEM[model.dtype], ("loss",))
    yield Buffer("gradient of the head", "loss", (1 + several * depths) * whole * 4, ("loss",))
    if several:
        rows = request.rows * request.length * model.hidden_size  # a device's own, on their way to it
        yield Buffer("embedded tokens, exchanged", "embedding in use", rows * 4, ("forward", "backward"))


def head_of(request: PlanRequest) -> Leaf:
    """The head's weight; the embedding where they are tied."""
    found = {leaf.part: leaf for leaf in leaves(request.model)}
    return found.get("head") or found["embedding"]


def cache_bytes(request: PlanRequest) -> dict[str, int]:
    """Bytes of one device's caches, by name of the entry."""
    model = request.model
    shapes = cache_shapes(
        model.attention, request.run.batch_size, request.run.seq_len, tiled=bool(request.device.torus)
    )
    item = ITEM[model.dtype]
    return {
        name: model.num_hidden_layers * item * math.prod(shape) // request.split(*names)
        for name, (shape, names) in shapes.items()
    }


def _serving(request: PlanRequest) -> Iterable[Buffer]:
    model, degrees = request.model, request.degrees
    item = ITEM[model.dtype]
    found = [leaf for leaf in leaves(model) if leaf.stack != "mtp"]
    for part, size in _by_part(found, lambda leaf: stored(leaf, degrees) * (4 if leaf.wide else item)).items():
        yield Buffer(f"weights: {part}", "weights", size)
    for name, size in cache_bytes(request).items():
        yield Buffer(f"cache: {name}", "cache", size)
    if request.topology.devices > 1:
        one = max(used(leaf, degrees) * item for leaf in found if leaf.stack)
        yield Buffer("one gathered weight", "weights in use", one)
    tokens = request.rows * (request.length if request.step == "prefill" else 1)
    words = model.vocab_size / request.split("act_vocab")
    yield Buffer("logits", "logits", int(request.rows * words * 4 * 2))
    if request.step == "prefill":
        moe = isinstance(model.ffn, MoE)
        for tensor in layer_tensors(request, moe):
            part = "expert rows in use" if tensor.expert else "activations in use"
            yield Buffer(tensor.name, part, int(tensor.bytes))
    else:
        N = model.attention.num_attention_heads / request.split("act_heads")
        scores = request.rows * N * request.length * 4
        yield Buffer("scores of one layer", "activations in use", int(2 * scores))
        yield Buffer("hidden state", "activations in use", int(tokens * model.hidden_size * item * 4))
