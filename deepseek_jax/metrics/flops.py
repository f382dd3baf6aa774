"""Model FLOPs and the share of a device's peak that they use (MFU).

The convention is PaLM's (arXiv 2204.02311, appendix B) with causal attention counted as what it is: matrix products of
the forward pass, 2 FLOPs a multiply-add, three times for forward and backward; of the experts those that a token is sent
to; attention over half of the sequence, since a query sees itself and what came before. Not counted: recomputation
(remat), the embedding's lookup, norms, softmax, rope, the optimizer. PaLM itself and Megatron count the whole square of
the scores: their MFU of the same run is higher (`causal=False` gives their count).
"""

from __future__ import annotations

from deepseek_jax import hardware
from deepseek_jax.config import GQA, MLA, ModelConfig, MoE


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """The most matrix-product FLOP/s of one device, in that compute dtype; from the table in hardware.py.

    Args:
        device_kind: `jax.devices()[0].device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".
        dtype: what is multiplied. Of float32 there is no one peak: jax multiplies it in TF32 or bfloat16 passes.
    Returns: dense FLOP/s, or None where it is not known (a CPU, another dtype).
    """
    device = hardware.by_kind(device_kind)
    if device is None or dtype not in ("bfloat16", "float16"):
        return None
    return device.bf16 if dtype == "bfloat16" else device.fp16


def forward_flops_per_token(config: ModelConfig, seq_len: int, *, causal: bool = True) -> dict[str, float]:
    """Matrix-product FLOPs of the forward pass, a token, by part.

    Args:
        config: the model; `seq_len` are tokens of a sequence.
        causal: count attention over half of the sequence; False over all of it.
    Returns: `projections`, `scores` (queries with keys, and with values), `feed_forward` (experts that a token is sent
        to, shared ones, dense layers), `router`, `head` and `mtp` (all of the multi-token modules).
    """
    D, ffn = config.hidden_size, config.ffn
    projections, scores = _attention(config, seq_len / 2 if causal else seq_len)
    dense = 6.0 * D * ffn.intermediate_size
    experts = router = 0.0
    if isinstance(ffn, MoE):
        experts = 6.0 * D * ffn.moe_intermediate_size * (ffn.num_experts_per_tok + ffn.n_shared_experts)
        router = 2.0 * D * ffn.n_routed_experts
    head = 2.0 * D * config.vocab_size
    block = projections + scores + (experts + router if isinstance(ffn, MoE) else dense)
    layers = config.num_hidden_layers
    return {
        "projections": layers * projections,
        "scores": layers * scores,
        "feed_forward": config.num_dense_layers * dense + config.num_moe_layers * experts,
        "router": config.num_moe_layers * router,
        "head": head,
        # Each module joins state and embedding, [2 D, D], then has a layer and the head (V3, eq. 21-23).
        "mtp": config.num_nextn_predict_layers * (4.0 * D * D + block + head),
    }


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of training on one token: three times the forward pass's, in the convention of this module.

    For deepseek-v3 at 4,096 tokens about 250e9, and 10e9 more for its multi-token module.
    """
    return 3 * sum(forward_flops_per_token(config, seq_len).values())


def mfu(tokens_per_second: float, flops_per_token: float, device_count: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: the share of the peak of `device_count` devices, 0 to 1; None where no peak is known."""
    return None if not peak else tokens_per_second * flops_per_token / (device_count * peak)


def _attention(config: ModelConfig, seen: float) -> tuple[float, float]:
    """(projections, scores) of a layer, where a query sees `seen` keys."""
    D, c = config.hidden_size, config.attention
    N = c.num_attention_heads
    if isinstance(c, GQA):
        H = c.head_dim
        return 4.0 * D * H * (N + c.num_key_value_heads), 4.0 * N * H * seen
    assert isinstance(c, MLA)
    P, R, V, C = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    Q = c.q_lora_rank
    query = D * N * (P + R) if Q is None else D * Q + Q * N * (P + R)
    key_value = D * (C + R) + C * N * (P + V)
    return 2.0 * (query + key_value + N * V * D), 2.0 * N * (P + R + V) * seen
