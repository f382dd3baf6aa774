"""What one layer keeps of a token, tensor by tensor: widths follow layers/, names are the checkpoint names where there are
any."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_jax.config import GQA, MoE
from deepseek_jax.layers.expert_parallel import Places
from deepseek_jax.models.block import V3_SAVED
from deepseek_jax.planner.request import PlanRequest

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Tensor:
    """An intermediate of a layer."""

    name: str
    bytes: float
    """Of one device, in one layer."""
    expert: bool = False
    """Rows of routed experts."""
    read: bool = True
    """The backward pass reads it; others are there while the layer runs alone."""


def expert_places(request: PlanRequest) -> Places:
    """Places that a device has in a MoE layer, for tokens and for token-expert pairs."""
    ffn, tokens = request.model.ffn, request.rows * request.length
    assert isinstance(ffn, MoE)
    X, E = ffn.num_experts_per_tok, ffn.n_routed_experts
    if request.split(request.exchange.axis) == 1:
        pairs = tokens * X
        return Places(departures=tokens, arrivals=tokens, pairs=pairs, rows=pairs)
    return request.exchange.places(tokens, X, E, request.split("expert"), request.slices_of_experts)


def layer_tensors(request: PlanRequest, moe: bool) -> list[Tensor]:
    """The intermediates of one layer, of one device."""
    model = request.model
    item, tokens = ITEM[model.dtype], request.rows * request.length
    heads, ffn_split = request.split("act_heads"), request.split("act_ffn")
    D = model.hidden_size

    def of(name: str, width: float, itemsize: int = item, rows: float = tokens, **kind: bool) -> Tensor:
        return Tensor(name, rows * width * itemsize, **kind)

    found = [of("block_in", D), of("attention_norm", D), *_attention(request, of, heads)]
    found += [of("block_attention", D, read=False)]
    found += [of("residual", D), of("ffn_norm", D)]
    ffn = model.ffn
    if not moe:
        width = ffn.intermediate_size / ffn_split
        return [*found, of("ffn_gate", width), of("ffn_up", width), of("ffn_hidden", width)]
    assert isinstance(ffn, MoE)
    E, F = ffn.n_routed_experts, ffn.moe_intermediate_size
    places, shards, slices = expert_places(request), request.split("expert"), request.slices_of_experts
    rows, arrivals, pairs = places.rows, places.arrivals, places.pairs
    found += [of("router_logits", E, 4), of("router_scores", E, 4)]
    if slices > 1:  # sent, received, added up, sent back, added up
        found += [of("slice_sent", D, rows=places.departures, expert=True, read=False)]
        found += [of("slice_received", D, rows=arrivals, expert=True, read=False)]
        found += [of("slice_sums", D, max(item, 4), rows=arrivals, expert=True, read=False)]
        found += [of("slice_back", D, max(item, 4), expert=True, read=False)]
    if shards > 1 and request.ring:
        names = ("expert_gathered", "expert_summed")
        found += [of(name, shards * D, rows=arrivals, expert=True, read=False) for name in names]
    elif shards > 1:  # sorted, sent, sorted again, and all the way back
        found += [of("expert_sent", D, rows=pairs, expert=True, read=False)]
        found += [of(name, D, rows=rows, expert=True, read=False) for name in ("expert_received", "expert_returned")]
    found += [
        of("expert_in", D, rows=rows, expert=True),
        of("expert_gate", F / ffn_split, rows=rows, expert=True),
        of("expert_up", F / ffn_split, rows=rows, expert=True),
        of("expert_hidden", F / ffn_split, rows=rows, expert=True),
        of("expert_out", D, rows=rows, expert=True, read=False),
        of("expert_back", D, max(item, 4), rows=pairs, expert=True),  # weighed in the dtype of the gate
    ]
    if ffn.n_shared_experts:
        width = ffn.n_shared_experts * F / ffn_split
        found += [of("ffn_gate", width), of("ffn_up", width), of("ffn_hidden", width)]
    return found


def _attention(request: PlanRequest, of, heads: int) -> list[Tensor]:
    c = request.model.attention
    N = c.num_attention_heads / heads
    if isinstance(c, GQA):
        K = c.num_key_value_heads / request.split("act_kv_heads")
        H = c.head_dim
        return [
            of("q", N * H, read=False), of("q_rotated", N * H), of("k", K * H, read=False), of("k_rotated", K * H),
            of("v", K * H), of("attention", N * H), of("attention_lse", N, 4),
        ]  # fmt: skip
    C, P, R, V = c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    query = (
        [of("q", N * (P + R), read=False)]
        if c.q_lora_rank is None
        else [of("c_q", c.q_lora_rank), of("q_norm", c.q_lora_rank)]
    )
    return [
        *query, of("q_rotated", N * (P + R)), of("c_kv", C), of("kv_norm", C), of("k_rope", R, read=False),
        of("k_written_out", N * (P + R)), of("v_written_out", N * V), of("attention", N * V), of("attention_lse", N, 4),
    ]  # fmt: skip


def saved(request: PlanRequest, tensors: list[Tensor], stack: str) -> list[Tensor]:
    """Those that the forward pass of a layer of `stack` keeps for the backward pass: by `ModelConfig.remat`, where "offload"
    at the host, but in a 1F1B pipeline its input alone."""
    remat = "full" if request.one_f_one_b and stack == request.piped_stack else request.model.remat
    if remat == "none":
        return [t for t in tensors if t.read]
    return [t for t in tensors if t.name == "block_in" or (remat == "v3" and t.name in V3_SAVED)]
