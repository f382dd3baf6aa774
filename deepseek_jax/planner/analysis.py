"""The answer to a plan by arithmetic: memory, FLOPs, traffic, the bound on a step's time, hours and money."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_jax.config import MoE
from deepseek_jax.planner.activations import ITEM, layer_tensors, saved
from deepseek_jax.planner.flops import Flops, flops_of
from deepseek_jax.planner.memory import Memory, memory_of, times_used, trained
from deepseek_jax.planner.prices import Price, price_of
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.planner.shapes import STACKS, check_divides, leaves, stored, used
from deepseek_jax.planner.traffic import Collective, collectives


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one step. Each is a bound from below for one resource at its full speed."""

    compute: float
    hbm: float
    links: float
    idle: float
    """Bubbles of the pipeline."""

    @property
    def bound(self) -> float:
        """All resources overlap."""
        return max(self.compute, self.hbm, self.links) + self.idle

    @property
    def no_overlap(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.hbm + self.links + self.idle

    @property
    def limit(self) -> str:
        return max(("compute", "hbm", "links"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a request without compiling it."""

    request: PlanRequest
    memory: Memory
    flops: Flops
    traffic: tuple[Collective, ...]
    times: Times
    price: Price | None

    @property
    def tokens_per_step(self) -> int:
        run = self.request.run
        return run.batch_size * (run.seq_len if self.request.step != "decode" else 1)

    @property
    def hbm_bytes(self) -> int:
        assert self.request.device.hbm is not None
        return self.request.device.hbm

    @property
    def headroom(self) -> int:
        """Bytes of a device that are left; negative where it does not fit."""
        return self.hbm_bytes - self.memory.peak

    @property
    def host_headroom(self) -> int:
        """Bytes left of a device's share of its host's memory."""
        return self.request.host_share - self.memory.host

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and self.host_headroom >= 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.times.bound

    @property
    def sequences_that_fit(self) -> int | None:
        """Serving: caches of this length for which there is room on all devices, weights and work taken off."""
        if self.request.trains:
            return None
        cache = sum(b.bytes for b in self.memory.buffers if b.part == "cache")
        each = cache * self.request.topology.devices / self.request.run.batch_size
        return int((self.hbm_bytes - self.memory.peak + cache) * self.request.topology.devices / each)

    @property
    def mfu(self) -> float:
        """Of the bound: the most that it can be."""
        peak = self.request.device.bf16 or 1.0
        return self.tokens_per_second * self.flops.model / (self.request.topology.devices * peak)

    def chip_hours(self, tokens: float, *, overlap: bool = True) -> float:
        """To work off `tokens`, everything overlapping or nothing."""
        seconds = self.times.bound if overlap else self.times.no_overlap
        return tokens / self.tokens_per_step * seconds * self.request.topology.chips / 3600

    def __str__(self) -> str:
        from deepseek_jax.planner.show import text  # which reads plans

        return text(self)

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        request, times = self.request, self.times
        tokens = request.tokens
        return {
            "model": request.model.name,
            "step": request.step,
            "topology": request.topology.name,
            "slices": request.topology.slices,
            "chips": request.topology.chips,
            "devices": request.topology.devices,
            "mesh": request.degrees,
            **request.pipeline_words,
            "batch": request.run.batch_size,
            "accumulation": request.run.accumulation,
            "seq": request.run.seq_len,
            "remat": request.model.remat,
            "analytic_bytes_per_device": self.memory.peak,
            "hbm_bytes": self.hbm_bytes,
            "headroom_bytes": self.headroom,
            "host_bytes_per_device": self.memory.host,
            "fits": self.fits,
            "peak_phase": self.memory.phase,
            "memory_by_part": self.memory.by_part,
            "largest_buffers": [{"name": b.name, "bytes": b.bytes} for b in self.memory.largest()],
            "parameters": sum(math.prod(leaf.shape) for leaf in leaves(request.model)),
            "flops_per_token": {
                "forward": self.flops.forward, "backward": self.flops.backward, "recomputed": self.flops.recomputed,
                "attention_forward": self.flops.attention, "empty": self.flops.empty,
            },
            "traffic": [
                {"name": c.name, "axes": list(c.axes), "bytes": c.bytes, "link": c.link, "seconds": c.seconds}
                for c in self.traffic
            ],
            "seconds": {
                "compute": times.compute, "hbm": times.hbm, "links": times.links, "idle": times.idle,
                "bound": times.bound, "no_overlap": times.no_overlap,
            },
            "limit": times.limit,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_no_overlap": self.tokens_per_step / times.no_overlap,
            "mfu_bound": self.mfu,
            "sequences_that_fit": self.sequences_that_fit,
            "price": None if self.price is None else vars(self.price),
            "tokens": tokens,
            "chip_hours": None if tokens is None else self.chip_hours(tokens),
            "chip_hours_no_overlap": None if tokens is None else self.chip_hours(tokens, overlap=False),
            "money": None if tokens is None or self.price is None else self.chip_hours(tokens) * self.price.amount,
        }  # fmt: skip


def analyse(request: PlanRequest, prices: str | Path | None = None) -> Plan:
    """Plan a request by arithmetic: milliseconds, but for the first look at a model's shapes, which takes a second.

    Args:
        request: what is planned.
        prices: a file like planner/prices.json; None: that one.

    Raises:
        ValueError: a mesh axis that does not divide a dim, with what would; a price file that is none.
    """
    check_divides(request.model, request.degrees)
    flops = flops_of(request)
    traffic = tuple(collectives(request))
    return Plan(
        request=request,
        memory=memory_of(request),
        flops=flops,
        traffic=traffic,
        times=_times(request, flops, traffic),
        price=price_of(request.topology.device, prices),
    )


def _times(request: PlanRequest, flops: Flops, traffic: tuple[Collective, ...]) -> Times:
    device, topology, run = request.device, request.topology, request.run
    assert device.bf16 and device.hbm_bandwidth
    tokens = run.batch_size * (run.seq_len if request.step != "decode" else 1)
    # Float32 is multiplied in several bfloat16 passes; three is what jax's default on TPU for "high" is.
    passes = 1 if request.model.dtype in ("bfloat16", "float16") else 3
    compute = passes * tokens * flops.executed / topology.devices / device.bf16
    by_link: dict[str, float] = {}
    for one in traffic:
        by_link[one.link] = by_link.get(one.link, 0.0) + one.seconds
    share = request.idle_share
    return Times(
        compute=compute,
        hbm=hbm_bytes(request) / device.hbm_bandwidth,
        links=max(by_link.values(), default=0.0),
        idle=compute * share / (1 - share),
    )


def hbm_bytes(request: PlanRequest) -> float:
    """Bytes that a device reads and writes in a step, at the least."""
    degrees, model = request.degrees, request.model
    item, param = ITEM[model.dtype], ITEM[model.param_dtype]
    if not request.trains:
        return _served(request)
    kept = sum(stored(leaf, degrees) for leaf in trained(request))
    moment = 2 if request.run.optimizer.moment_dtype == "bfloat16" else 4
    # Read and written: parameters, both moments, the gradient.
    optimizer = kept * 2 * (param + 2 * moment + 4)
    weights = sum(times_used(request, leaf) * used(leaf, degrees) * item for leaf in trained(request))
    # Written where gathered and read: forward, backward for inputs; gradients of weights written and read.
    moved = request.run.accumulation * 6 * weights
    moe = model.num_moe_layers
    counts = dict(zip(STACKS, (model.num_dense_layers, moe, model.num_nextn_predict_layers), strict=True))
    activations = 0.0
    for stack, layers in counts.items():
        if layers:
            tensors = layer_tensors(request, stack != "dense_layers" and moe > 0)
            again = sum(t.bytes for t in tensors) - sum(t.bytes for t in saved(request, tensors, stack))
            # Written and read once forward, read and a gradient written and read backward, what is redone once more.
            activations += request.computed_layers(stack, layers) * (5 * sum(t.bytes for t in tensors) + 2 * again)
    return optimizer + moved + request.run.accumulation * activations


def _served(request: PlanRequest) -> float:
    """Of a serving step: weights (of routed experts those that a token asks for, of the embedding the tokens' rows), caches,
    what is gathered."""
    model, memory = request.model, memory_of(request)
    experts = sum(b.bytes for b in memory.buffers if b.name == "weights: experts")
    read = sum(b.bytes for b in memory.buffers if b.part in ("weights", "cache", "logits")) - experts
    if not model.tie_word_embeddings:
        tokens = request.rows * (request.length if request.step == "prefill" else 1)
        table = sum(b.bytes for b in memory.buffers if b.name == "weights: embedding")
        read += min(table, tokens * model.hidden_size * ITEM[model.dtype]) - table
    if isinstance(model.ffn, MoE):
        tokens = request.run.batch_size * (request.run.seq_len if request.step == "prefill" else 1)
        share = model.ffn.num_experts_per_tok / model.ffn.n_routed_experts
        read += experts * (1 - (1 - share) ** tokens)
    gathered = sum(one.bytes for one in collectives(request) if one.name == "weights gathered")
    work = sum(b.bytes for b in memory.buffers if b.part.endswith("in use"))
    return read + 2 * gathered + 2 * work * (model.num_hidden_layers if request.step == "prefill" else 1)
