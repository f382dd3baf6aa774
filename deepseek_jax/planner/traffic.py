"""Bytes that a device receives over each kind of link in one step, and the least time they take (planner/links.py).

A collective over n devices of S bytes in all brings each device S · (n − 1) / n. How often one happens is what the compiled
steps were seen to do: parallel/, layers/ and training/loss.py say why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from deepseek_jax.config import GQA, MoE
from deepseek_jax.layers.expert_slices import slices_of_token
from deepseek_jax.parallel.rules import RULES
from deepseek_jax.planner.activations import ITEM
from deepseek_jax.planner.links import Link, Way, routes
from deepseek_jax.planner.memory import head_of, memory_of, times_used, trained
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.planner.shapes import Leaf, gathered_axes, leaves, stored, used


@dataclass(frozen=True)
class Collective:
    """One kind of traffic of a step, over one kind of link."""

    name: str
    axes: tuple[str, ...]
    bytes: float
    """Received by one device in one step, over this link."""
    link: Link
    seconds: float
    """At the link's speed, nothing else on it."""


def collectives(request: PlanRequest) -> list[Collective]:
    """All traffic of one step, most time first."""
    found = _training(request) if request.trains else _serving(request)
    return sorted((one for one in found if one.bytes), key=lambda one: -one.seconds)


def _over(
    request: PlanRequest, name: str, axes: Iterable[str], received: float, way: Way = "gather"
) -> Iterable[Collective]:
    """What a device receives in a collective, by the links that it crosses; nothing where the axes are one device."""
    axes = tuple(axis for axis in axes if request.degrees[axis] > 1)
    for route in routes(request, axes, way) if axes else ():
        yield Collective(name, axes, received * route.share, route.link, received * route.share / route.speed)


def _gathered(
    request: PlanRequest, found: Iterable[Leaf], itemsize: Callable[[Leaf], int]
) -> Iterable[tuple[tuple[str, ...], float]]:
    """Mesh axes, and the bytes that a device receives where it gathers all layers of these leaves over them, once; those of
    a pipeline's stage in each tick, from the devices of that stage."""
    groups: dict[tuple[str, ...], float] = {}
    for leaf in found:
        axes = gathered_axes(leaf, request.degrees)
        if leaf.stack and leaf.stack == request.piped_stack:
            axes = tuple(axis for axis in axes if axis != "stage")
        if axes:
            size = times_used(request, leaf) * used(leaf, request.degrees) * itemsize(leaf)
            groups[axes] = groups.get(axes, 0) + size
    for axes, size in groups.items():
        n = math.prod(request.degrees[axis] for axis in axes)
        yield axes, size * (n - 1) / n


def _training(request: PlanRequest) -> Iterable[Collective]:
    run, model = request.run, request.model
    depths = model.num_nextn_predict_layers if request.step == "train" else 0
    yield from _weights(request, depths)
    yield from _embedded(request, run.accumulation * (1 + depths), passes=2 + (request.step == "grpo"))
    yield from _to_stages(request)
    yield from _copies(request)
    if request.moments_at_host or model.remat == "offload":  # there and back; both ways at once where the link can
        waiting = [buffer for buffer in memory_of(request).buffers if buffer.on_host]
        on_host = sum(b.bytes * (1 if b.part == "optimizer" else run.accumulation) for b in waiting)
        assert request.device.host_link
        yield Collective("to the host's memory and back", (), 2 * on_host, "host", on_host / request.device.host_link)
    yield from _layers(request)


def _weights(request: PlanRequest, depths: int) -> Iterable[Collective]:
    """Weights on the way to where they are used, and their gradients to where they are stored, in each piece."""
    model, pieces = request.model, request.run.accumulation
    compute, param = ITEM[model.dtype], ITEM[model.param_dtype]
    layers = [leaf for leaf in trained(request) if leaf.part not in ("embedding", "head")]
    head = head_of(request)
    whole = [*layers, head]

    def used_in(leaf: Leaf) -> int:
        return param if leaf.wide else compute

    def summed_in(leaf: Leaf) -> int:
        if leaf == head:  # in float32, of each depth's loss
            return (1 + depths) * max(param, 4)
        return max(used_in(leaf), max(param, 4) if model.wide_sums else 0)

    for axes, moved in _gathered(request, whole, used_in):
        yield from _over(request, "weights gathered, forward", axes, pieces * moved)
        if request.step == "grpo":
            yield from _over(request, "reference gathered", axes, pieces * moved)
    # Without recomputation the compiler may keep none either. The loss has its gradient while it has the head.
    for axes, moved in _gathered(request, layers, used_in):
        yield from _over(request, "weights gathered, backward", axes, pieces * moved)
    for axes, moved in _gathered(request, whole, summed_in):
        yield from _over(request, "gradients reduced and scattered", axes, pieces * moved)
    if model.expert_gather_parts > 1:  # what is gathered in parts is gathered once more
        routed = (leaf for leaf in layers if leaf.routed)
        for axes, moved in _gathered(request, routed, lambda _: compute):
            yield from _over(request, "experts gathered in parts", axes, pieces * moved)


def _copies(request: PlanRequest) -> Iterable[Collective]:
    """Gradients summed over copies of the weights, in each piece, as its backward pass ends."""
    degrees, pieces = request.degrees, request.run.accumulation
    for axis in ("slice", "data"):
        n = degrees[axis]
        copies = (leaf for leaf in trained(request) if not any(axis in RULES[name] for name in leaf.names))
        kept = sum(stored(leaf, degrees) * _copies_summed_in(request, leaf) for leaf in copies)
        yield from _over(request, f"gradients summed over {axis}", (axis,), pieces * 2 * kept * (n - 1) / n)


def _copies_summed_in(request: PlanRequest, leaf: Leaf) -> int:
    """Bytes of a number of a weight's gradient as its copies add it up: of a dense matrix that of the product; where the
    program itself casts weights (experts, embedding, head), that of what is stored."""
    model = request.model
    param = ITEM[model.param_dtype]
    wide = model.wide_sums or leaf.wide or leaf.routed or leaf.part in ("head", "embedding")
    return max(param, 4) if wide else ITEM[model.dtype]


def _embedded(request: PlanRequest, times: int, passes: int) -> Iterable[Collective]:
    """Of the embedding each device looks up its part of the width for all, and they exchange what they found; where
    sequences are split, parts of the table come together first, and their gradients are added up in float32.

    Args:
        request: what is planned.
        times: how often tokens are embedded.
        passes: in how many passes what was found, or its gradient, is exchanged.
    """
    model, degrees = request.model, request.degrees
    axes = [axis for axis in RULES["embed"] if degrees[axis] > 1]
    cut = next((i for i, axis in enumerate(axes) if axis in RULES["length"]), len(axes))
    n, parts = (math.prod(degrees[axis] for axis in some) for some in (axes[:cut], axes[cut:]))
    item, tokens = ITEM[model.dtype], request.rows * (request.length if request.step != "decode" else 1)
    row = times * tokens * model.hidden_size * item
    yield from _over(request, "embedded tokens", axes[:cut], passes * row * (n - 1) / n, way="all-to-all")
    table = times * model.vocab_size * model.hidden_size / request.split("vocab") / n
    moved = item * (passes - request.trains) + max(item, 4) * request.trains
    yield from _over(request, "embedding gathered", axes[cut:], table * moved * (parts - 1) / parts)


def _to_stages(request: PlanRequest) -> Iterable[Collective]:
    """A pipeline's layers on the way from where they are stored to their stages, in the dtype that they are used in, and
    their gradients on the way back; what a stage has of empty layers comes from no one."""
    model, S = request.model, request.degrees["stage"]
    if request.piped_stack is None:
        return
    split = [leaf for leaf in trained(request) if "stage" in gathered_axes(leaf, request.degrees)]  # not the norms
    piped = [leaf for leaf in split if leaf.stack == request.piped_stack]
    param, compute = ITEM[model.param_dtype], ITEM[model.dtype]
    there = sum(stored(leaf, request.degrees) * (param if leaf.wide else compute) for leaf in piped)
    back = sum(stored(leaf, request.degrees) for leaf in piped) * max(compute, 4)
    received = request.run.accumulation * (there + back) * (S - 1) / S
    yield from _over(request, "layers to their stages and back", ("stage",), received, way="all-to-all")


# How often a layer of a training step moves what its forward pass moves in one direction, by what is worked out again.
# Tokens go out and results come back, and both again as gradients. The gradient of a pair's weight needs the result that
# came back, which no `remat` keeps; the ring weighs results before they go back, and rows for experts are kept by "v3".
_PAIRS = {"forward": 2, "none": 4, "v3": 5, "full": 6}
_RING = {"forward": 2, "none": 4, "v3": 4, "full": 5}
# Bytes of a route that is told to all slices: an expert's number and weight; the weight once more, its gradient.
_ROUTES = {"forward": 8, "none": 12, "v3": 16, "full": 16}
# Keys and values round the ring of a split sequence, in the compute dtype; their gradients go round besides, in float32.
_KEYS = {"forward": 1, "none": 2, "v3": 2, "full": 3}
# Sums over the devices that share a matrix: where attention and a feed-forward end, in the backward pass where they begin.
# A MoE layer's routed and shared experts end apart. What the layer ends with is not worked out again.
_SUMS = {"forward": 2, "none": 4, "v3": 4, "full": 5}
_SUMS_MOE = {"forward": 3, "none": 6, "v3": 6, "full": 7}


def _times(request: PlanRequest, table: Mapping[str, int]) -> int:
    """Of one of these tables, for the step; that of GRPO has the reference's forward pass besides."""
    if not request.trains:
        return table["forward"]
    return table[request.redone] + table["forward"] * (request.step == "grpo")


def _layers(request: PlanRequest) -> Iterable[Collective]:
    """Traffic of activations."""
    model, degrees = request.model, request.degrees
    item, D = ITEM[model.dtype], model.hidden_size
    pieces = request.run.accumulation if request.trains else 1
    tokens = pieces * request.rows * (request.length if request.step != "decode" else 1)
    layers = model.num_hidden_layers + (model.num_nextn_predict_layers if request.step == "train" else 0)
    layers += request.empty_layers  # which work, and send, like others
    if isinstance(model.ffn, MoE):
        yield from _experts(request, model.ffn, tokens * (layers - model.num_dense_layers))
    n = degrees["context"]
    width = _keys_width(request) * (item * _times(request, _KEYS) + max(item, 4) * request.trains)
    yield from _over(
        request, "keys and values around the ring", ("context",), layers * tokens * width * n, way="round"
    )  # n sends, the last of which brings them home
    n = degrees["tensor"]
    moe = layers - model.num_dense_layers if isinstance(model.ffn, MoE) and model.ffn.n_shared_experts else 0
    sums = moe * _times(request, _SUMS_MOE) + (layers - moe) * _times(request, _SUMS)
    yield from _over(request, "activations summed over tensor", ("tensor",), sums * 2 * tokens * D * item * (n - 1) / n)
    if request.run.pipeline is not None and request.piped_stack is not None:
        # Three sends a tick, each of a microbatch: the streams of microbatches and of results, and to the next stage; for
        # gradients as many.
        sends = 2 * 3 * request.pipeline_ticks
        microbatch = tokens * degrees["stage"] / request.run.pipeline.microbatches
        what = "activations from stage to stage"
        yield from _over(request, what, ("stage",), sends * microbatch * D * item, way="round")


def _experts(request: PlanRequest, ffn: MoE, tokens: int) -> Iterable[Collective]:
    """Tokens to their experts and back. `tokens`: of a device, those of each MoE layer counted."""
    model, n, slices = request.model, request.degrees["expert"], request.slices_of_experts
    row, chosen = model.hidden_size * ITEM[model.dtype], ffn.num_experts_per_tok
    # A token goes once to each slice with experts of its own, as many as there may be; its route is told to all.
    visits = slices_of_token(request.exchange.groups, chosen, slices)
    across = tokens * visits * row * (slices - 1) / slices * _times(request, _RING)
    routes_told = tokens * chosen * (slices - 1) * _times(request, _ROUTES)
    what = "tokens to slices and back"
    yield from _over(request, what, ("slice",) * (slices > 1), across + routes_told, way="all-to-all")
    # A pair travels once to its expert; on the ring all tokens of the slice travel to all.
    what, each = "tokens to experts and back", tokens * row * (n - 1)
    if request.ring:
        yield from _over(request, what, ("expert",), each * visits * _times(request, _RING))
    else:
        yield from _over(request, what, ("expert",), each * chosen / n * _times(request, _PAIRS), way="all-to-all")


def _keys_width(request: PlanRequest) -> float:
    """Numbers of a token, on one device, that go round where sequences are split: keys and values, MLA's latents."""
    c = request.model.attention
    if isinstance(c, GQA):
        return 2 * c.num_key_value_heads * c.head_dim / request.split("act_kv_heads")
    return c.kv_lora_rank + c.qk_rope_head_dim


def _serving(request: PlanRequest) -> Iterable[Collective]:
    model = request.model
    head = head_of(request)
    served = (leaf for leaf in leaves(model) if leaf.stack != "mtp" and (leaf.part != "embedding" or leaf == head))
    for axes, moved in _gathered(request, served, lambda _: ITEM[model.dtype]):
        yield from _over(request, "weights gathered", axes, moved)
    yield from _embedded(request, times=1, passes=1)
    yield from _layers(request)
