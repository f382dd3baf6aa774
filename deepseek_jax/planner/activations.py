"""What one layer keeps of a token, tensor by tensor: widths follow layers/, names are the checkpoint names where there are
any."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_jax.config import GQA, MoE
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


def expert_rows(request: PlanRequest) -> float:
    """Token-expert pairs that a device has places for in a MoE layer."""
    ffn = request.model.ffn
    assert isinstance(ffn, MoE)
    tokens = request.rows * request.length
    shards = request.split("expert")
    even = tokens * ffn.num_experts_per_tok  # what all shards send is spread evenly over them
    if shards == 1:
        return even
    most = tokens * shards * min(ffn.num_experts_per_tok, ffn.n_routed_experts // shards)
    factor = request.model.expert_buffer_factor
    return most if factor is None else min(most, factor * even)


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
    rows, E, X, F = expert_rows(request), ffn.n_routed_experts, ffn.num_experts_per_tok, ffn.moe_intermediate_size
    found += [of("router_logits", E, 4), of("router_scores", E, 4)]
    shards = request.split("expert")
    if shards > 1 and model.expert_exchange == "ring":
        found += [of(name, shards * D, expert=True, read=False) for name in ("expert_gathered", "expert_summed")]
    elif shards > 1:  # sorted, sent, sorted again, and all the way back
        found += [of("expert_sent", X * D, expert=True, read=False)]
        found += [of(name, D, rows=rows, expert=True, read=False) for name in ("expert_received", "expert_returned")]
    found += [
        of("expert_in", D, rows=rows, expert=True),
        of("expert_gate", F / ffn_split, rows=rows, expert=True),
        of("expert_up", F / ffn_split, rows=rows, expert=True),
        of("expert_hidden", F / ffn_split, rows=rows, expert=True),
        of("expert_out", D, rows=rows, expert=True, read=False),
        of("expert_back", X * D, max(item, 4), expert=True),  # weighed in the dtype of the gate
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
    """Those that the forward pass of a layer of `stack` keeps for the backward pass: by `ModelConfig.remat`, but in a 1F1B
    pipeline its input alone."""
    remat = "full" if request.one_f_one_b and stack == request.piped_stack else request.model.remat
    if remat == "none":
        return [t for t in tensors if t.read]
    if remat == "offload":
        return []
    return [t for t in tensors if t.name == "block_in" or (remat == "v3" and t.name in V3_SAVED)]
