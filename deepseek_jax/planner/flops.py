"""FLOPs of a token in each step: what the model asks for, what is worked out again, what a pipeline spends on nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepseek_jax.config import MLA, ModelConfig, MoE
from deepseek_jax.metrics.flops import forward_flops_per_token
from deepseek_jax.planner.request import PlanRequest


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one token; matrix products, causal attention (metrics/flops.py)."""

    forward: float
    backward: float
    recomputed: float
    attention: float
    """Part of `forward` that is queries with keys and values."""
    empty: float = 0.0
    """All that is spent on the layers with which a pipeline is filled up."""

    @property
    def model(self) -> float:
        """What MFU counts: no recomputation."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.model + self.recomputed + self.empty


def flops_of(request: PlanRequest) -> Flops:
    """FLOPs of a token. In decoding a token sees the whole context."""
    found = _flops_of(request, request.model)
    if not request.empty_layers:
        return found
    layers = request.model.num_hidden_layers + request.empty_layers
    filled = _flops_of(request, replace(request.model, num_hidden_layers=layers))
    return replace(found, empty=filled.executed - found.executed)


def _flops_of(request: PlanRequest, model: ModelConfig) -> Flops:
    """Of a model with the request's widths."""
    seq, decodes = request.run.seq_len, request.step == "decode"
    parts = forward_flops_per_token(model, seq, causal=not decodes)
    if request.step != "train":
        parts["mtp"] = 0.0
    if request.step == "prefill":  # the head is asked about the last token of a prompt alone
        parts["head"] /= seq
    if decodes and isinstance(model.attention, MLA):
        parts["scores"] = _absorbed_scores(model, seq)
    forward, attention = sum(parts.values()), parts["scores"]
    if not request.trains:
        return Flops(forward=forward, backward=0.0, recomputed=0.0, attention=attention)
    whole = forward - _not_redone(model, parts["head"], mtp=request.step == "train")
    recomputed = {"none": 0.0, "full": whole, "v3": _up_projections(model)}[request.redone]
    if request.step == "grpo":  # the reference's log-probabilities are one more forward pass
        recomputed += forward
    return Flops(forward=forward, backward=2 * forward, recomputed=recomputed, attention=attention)


def _absorbed_scores(model: ModelConfig, seen: int) -> float:
    """FLOPs a token of attention to latents and rotated keys as they lie in the cache: every head multiplies by the whole
    latent, for its scores and for what it takes."""
    c = model.attention
    assert isinstance(c, MLA)
    return 2.0 * model.num_hidden_layers * c.num_attention_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) * seen


def _not_redone(model: ModelConfig, head: float, mtp: bool) -> float:
    """FLOPs a token of the forward pass that no backward pass wants again: heads, and down-projections that are a layer's
    last product. Routed experts' are redone: the gradient of a gate weight wants their results."""
    ffn, depths = model.ffn, model.num_nextn_predict_layers * mtp
    if isinstance(ffn, MoE):
        shared = (model.num_moe_layers + depths) * ffn.n_shared_experts * ffn.moe_intermediate_size
        widths = model.num_dense_layers * ffn.intermediate_size + shared
    else:
        widths = (model.num_dense_layers + depths) * ffn.intermediate_size
    return head * (1 + depths) + 2.0 * model.hidden_size * widths


def _up_projections(model: ModelConfig) -> float:
    """FLOPs a token of MLA's up-projections, which remat = "v3" does again."""
    c, layers = model.attention, model.num_hidden_layers
    if not isinstance(c, MLA):
        return 0.0
    query = (c.q_lora_rank or 0) * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    return 2.0 * layers * c.num_attention_heads * (query + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim))
