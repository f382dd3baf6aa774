"""Bytes that a device receives over each kind of link in one step, and the least time they take.

A collective over n devices of S bytes in all brings each device S · (n − 1) / n. A ring on a torus dim uses its two links
in both directions where the dim closes, one where it does not; a collective over mesh axes that fill d dims of the torus
has d such rings. An all-to-all is held up by the middle of the longest ring: with k devices on it, k / 8 times the bytes
of a device over one link, twice that where the dim does not close. GPUs of a host meet in a switch; what leaves a host,
or a slice, goes over the data-centre network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from deepseek_jax.config import GQA, MoE
from deepseek_jax.layers.expert_slices import slices_of_token
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.activations import ITEM
from deepseek_jax.planner.memory import memory_of, trained
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.planner.shapes import Leaf, gathered_axes, leaves, stored, used

Link = Literal["ici", "nvlink", "network", "host"]


@dataclass(frozen=True)
class Collective:
    """One kind of traffic of a step."""

    name: str
    axes: tuple[str, ...]
    bytes: float
    """Received by one device in one step."""
    link: Link
    seconds: float
    """At the link's speed, nothing else on it."""


def link_of(request: PlanRequest, axes: tuple[str, ...], all_to_all: bool = False) -> tuple[Link, float]:
    """The slowest link that a collective over these mesh axes crosses, and what a device receives over it, bytes/s."""
    topology, device, degrees = request.topology, request.device, request.degrees
    names = list(degrees)
    assert device.network and device.link
    if "slice" in axes and degrees["slice"] > 1:
        return "network", device.network
    if not device.torus:
        # Axes that stand last are neighbours: a group spans a host's GPUs times whatever lies between its axes.
        first = min(names.index(axis) for axis in axes)
        span = math.prod(degrees[name] for name in names[first:])
        return ("nvlink", device.link) if span <= topology.shape[1] else ("network", device.network)
    rings = _rings(request, math.prod(degrees[axis] for axis in axes))
    if not rings:
        return "ici", 2 * device.link  # two cores of one chip
    if all_to_all:
        return "ici", min(device.link * (8 if closed else 4) / size for size, closed in rings)
    return "ici", sum(device.link * (2 if closed else 1) for _, closed in rings)


def _rings(request: PlanRequest, devices: int) -> list[tuple[float, bool]]:
    """(chips, whether it closes) of the rings that a group of so many devices lies on: as few dims as hold it."""
    topology, left, found = request.topology, devices / request.device.per_chip, []
    for dim in sorted(range(len(topology.shape)), key=lambda dim: -topology.shape[dim]):
        if left <= 1:
            break
        size = min(left, topology.shape[dim])
        found.append((size, size == topology.shape[dim] and topology.wraps(dim)))
        left /= topology.shape[dim]
    return found


def collectives(request: PlanRequest) -> list[Collective]:
    """All traffic of one step, most time first."""
    found = _training(request) if request.trains else _serving(request)
    return sorted((one for one in found if one.bytes), key=lambda one: -one.seconds)


def _one(request: PlanRequest, name: str, axes: Iterable[str], received: float, all_to_all: bool = False) -> Collective:
    axes = tuple(axis for axis in axes if request.degrees[axis] > 1)
    if not axes or not received:
        return Collective(name, axes, 0, "ici", 0.0)
    link, speed = link_of(request, axes, all_to_all)
    return Collective(name, axes, received, link, received / speed)


def _gathered(
    request: PlanRequest, found: Iterable[Leaf], itemsize: Callable[[Leaf], int]
) -> Iterable[tuple[tuple[str, ...], float]]:
    """Mesh axes, and the bytes that a device receives where it gathers all layers of these leaves over them, once."""
    groups: dict[tuple[str, ...], float] = {}
    for leaf in found:
        if axes := gathered_axes(leaf, request.degrees):
            groups[axes] = groups.get(axes, 0) + leaf.layers * used(leaf, request.degrees) * itemsize(leaf)
    for axes, size in groups.items():
        n = math.prod(request.degrees[axis] for axis in axes)
        yield axes, size * (n - 1) / n


def _training(request: PlanRequest) -> Iterable[Collective]:
    run, degrees, model = request.run, request.degrees, request.model
    compute, param = ITEM[model.dtype], ITEM[model.param_dtype]
    pieces = run.accumulation
    for axes, moved in _gathered(request, trained(request), lambda leaf: param if leaf.wide else compute):
        # Once in the forward and once in the backward pass; without recomputation the compiler may keep none either.
        yield _one(request, "weights gathered, forward", axes, pieces * moved)
        yield _one(request, "weights gathered, backward", axes, pieces * moved)
    wide = max(param, 4) if model.wide_sums else 0
    for axes, moved in _gathered(request, trained(request), lambda leaf: max(param if leaf.wide else compute, wide)):
        yield _one(request, "gradients reduced and scattered", axes, pieces * moved)
    if model.expert_gather_parts > 1:  # what is gathered in parts is gathered once more
        routed = (leaf for leaf in trained(request) if leaf.routed)
        for axes, moved in _gathered(request, routed, lambda _: compute):
            yield _one(request, "experts gathered in parts", axes, pieces * moved)
    for axis in ("slice", "data"):
        n = degrees[axis]
        copies = (leaf for leaf in trained(request) if not any(axis in RULES[name] for name in leaf.names))
        kept = sum(stored(leaf, degrees) for leaf in copies) * max(param, 4)
        yield _one(request, f"gradients summed over {axis}", (axis,), 2 * kept * (n - 1) / n)
    if request.moments_at_host or model.remat == "offload":  # there and back; both ways at once where the link can
        waiting = [buffer for buffer in memory_of(request).buffers if buffer.on_host]
        on_host = sum(b.bytes * (1 if b.part == "optimizer" else pieces) for b in waiting)
        assert request.device.host_link
        yield Collective("to the host's memory and back", (), 2 * on_host, "host", on_host / request.device.host_link)
    yield from _layers(
        request, passes=4 if request.one_f_one_b or run.model.remat in ("full", "offload") else 3, pieces=pieces
    )


def _layers(request: PlanRequest, passes: int, pieces: int) -> Iterable[Collective]:
    """Traffic of activations. `passes`: how often a forward pass's worth of expert traffic moves in a step."""
    model, degrees = request.model, request.degrees
    item, D = ITEM[model.dtype], model.hidden_size
    tokens = request.rows * (request.length if request.step != "decode" else 1)
    layers = model.num_hidden_layers + (model.num_nextn_predict_layers if request.step == "train" else 0)
    if isinstance(model.ffn, MoE):
        n, slices, chosen = degrees["expert"], request.slices_of_experts, model.ffn.num_experts_per_tok
        moe = model.num_moe_layers + layers - model.num_hidden_layers
        ring = model.expert_exchange == "ring" or not request.trains
        # Out and back are two; the backward pass moves both again, and a full recomputation sends once more.
        times, told = {1: (2, 8), 3: (4, 12), 4: (5, 16)}[passes]
        # A token goes once to each slice with experts of its own, as many as there may be; its route is told to all:
        # numbers of experts, gate weights (again where they are recomputed), their gradients.
        visits = slices_of_token(request.exchange.groups, chosen, slices)
        across = tokens * visits * D * item * (slices - 1) / slices * times
        routes = tokens * chosen * (slices - 1) * told
        what = "tokens to slices and back"
        yield _one(request, what, ("slice",) * (slices > 1), pieces * moe * (across + routes), all_to_all=True)
        # A pair travels once to its expert; on the ring all tokens of the slice travel to all.
        each = tokens * D * item * (n - 1) * (visits if ring else chosen / n)
        what = "tokens to experts and back"
        yield _one(request, what, ("expert",), pieces * moe * each * times, all_to_all=not ring)
    n = degrees["context"]
    c = model.attention
    width = 2 * c.num_key_value_heads * c.head_dim if isinstance(c, GQA) else c.kv_lora_rank + c.qk_rope_head_dim
    yield _one(
        request, "keys and values around the ring", ("context",),
        pieces * layers * tokens * width * item * (n - 1) * passes,
    )  # fmt: skip
    n = degrees["tensor"]
    yield _one(
        request, "activations summed over tensor", ("tensor",),
        pieces * layers * (2 if passes == 1 else 4) * 2 * tokens * D * item * (n - 1) / n,
    )  # fmt: skip
    n = degrees["stage"]
    yield _one(request, "activations to the next stage", ("stage",), pieces * tokens * D * item * (2 if n > 1 else 0))


def _serving(request: PlanRequest) -> Iterable[Collective]:
    model = request.model
    served = (leaf for leaf in leaves(model) if leaf.stack != "mtp" and leaf.part != "embedding")
    for axes, moved in _gathered(request, served, lambda _: ITEM[model.dtype]):
        yield _one(request, "weights gathered", axes, moved)
    yield from _layers(request, passes=1, pieces=1)
