"""Every member of the family by name, and a tiny twin of each kind.

Figures: DeepSeek LLM (arXiv 2401.02954, table 2), DeepSeekMoE (2401.06066, sections 4.1.3, 5.1.2, 7.1), V2 (2405.04434),
V3 (2412.19437), Coder, Math and R1 with their published config.json. What a paper leaves open is listed in `assumed`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deepseek_jax.config import (
    GQA,
    MLA,
    Dense,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    MoE,
    Rope,
    YarnScaling,
)

_LLM: dict[str, Any] = dict(vocab_size=102400, max_position_embeddings=4096, bos_token_id=100000, eos_token_id=100001)


def _dense(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, width: int, rope: Rope | None = None, **fields
) -> ModelConfig:
    """A llama-shaped member: GQA with head dim 128, dense SwiGLU."""
    bias = fields.pop("qkv_bias", False)
    return ModelConfig(
        name=name,
        num_hidden_layers=layers,
        hidden_size=hidden,
        attention=GQA(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, qkv_bias=bias),
        ffn=Dense(intermediate_size=width),
        rope=rope or Rope(),
        **fields,
    )


def _coder(name: str, layers: int, hidden: int, heads: int, kv_heads: int, width: int) -> ModelConfig:
    rope = Rope(theta=100000.0, scaling=LinearScaling(factor=4.0))
    return _dense(
        name, layers, hidden, heads, kv_heads, width, rope,
        vocab_size=32256, max_position_embeddings=16384, bos_token_id=32013, eos_token_id=32014,
    )  # fmt: skip


def _softmax_moe(**fields) -> MoE:
    return MoE(scoring_func="softmax", **{"topk_method": "greedy", **fields})


def _moe(name: str, layers: int, hidden: int, heads: int, ffn: MoE, **fields) -> ModelConfig:
    """A member of DeepSeekMoE: multi-head attention, softmax gates."""
    return ModelConfig(
        name=name,
        num_hidden_layers=layers,
        hidden_size=hidden,
        attention=GQA(num_attention_heads=heads, num_key_value_heads=heads, head_dim=128),
        ffn=ffn,
        rope=Rope(),
        **{**_LLM, **fields},
    )


def _latent_rope(mscale: float) -> Rope:
    scaling = YarnScaling(factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale)
    return Rope(interleaved=True, scaling=scaling)


def _latent(
    name: str, layers: int, hidden: int, heads: int, q_rank: int | None, ffn: MoE, rope: Rope, **fields
) -> ModelConfig:
    """A member with MLA, at its published 160K positions."""
    return ModelConfig(
        name=name,
        num_hidden_layers=layers,
        hidden_size=hidden,
        attention=MLA(
            num_attention_heads=heads, q_lora_rank=q_rank, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        ),
        ffn=ffn,
        rope=rope,
        **{**_LLM, "max_position_embeddings": 163840, **fields},
    )  # fmt: skip


def _v2_lite(name: str) -> ModelConfig:
    ffn = _softmax_moe(
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, expert_loss_alpha=0.001,
    )  # fmt: skip
    return _latent(name, 27, 2048, 16, None, ffn, _latent_rope(0.707))


def _v2(name: str) -> ModelConfig:
    ffn = _softmax_moe(
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0, expert_loss_alpha=0.003, device_loss_alpha=0.05, communication_loss_alpha=0.02,
        capacity_factor=1.0,
    )  # fmt: skip
    return _latent(name, 60, 5120, 128, 1536, ffn, _latent_rope(0.707))


def _v3(name: str) -> ModelConfig:
    ffn = MoE(
        intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=3, scoring_func="sigmoid", topk_method="noaux_tc",
        n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, sequence_loss_alpha=0.0001,
    )  # fmt: skip
    return _latent(
        name, 61, 7168, 128, 1536, ffn, _latent_rope(1.0),
        vocab_size=129280, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=1,
    )  # fmt: skip


def _moe_16b(name: str) -> ModelConfig:
    ffn = _softmax_moe(
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, expert_loss_alpha=0.001,
    )  # fmt: skip
    return _moe(name, 28, 2048, 16, ffn)


def _moe_2b(name: str) -> ModelConfig:
    ffn = _softmax_moe(
        intermediate_size=0, moe_intermediate_size=880, n_routed_experts=63, n_shared_experts=1,
        num_experts_per_tok=7, first_k_dense_replace=0, expert_loss_alpha=0.01,
    )  # fmt: skip
    return _moe(
        name, 9, 1280, 10, ffn, vocab_size=8192, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
        assumed=("moe_intermediate_size", "vocab_size"),
    )  # fmt: skip


def _moe_145b(name: str) -> ModelConfig:
    ffn = _softmax_moe(
        intermediate_size=22016, moe_intermediate_size=1408, n_routed_experts=128, n_shared_experts=4,
        num_experts_per_tok=12, first_k_dense_replace=1, n_group=4, topk_group=4,
        expert_loss_alpha=0.003, device_loss_alpha=0.05,
    )  # fmt: skip
    assumed = ("intermediate_size", "moe_intermediate_size", "n_group", "topk_group")
    return _moe(name, 62, 4096, 32, ffn, assumed=assumed)


def _qwen(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, width: int, vocab: int, theta: float, eps: float
) -> ModelConfig:
    return _dense(
        name, layers, hidden, heads, kv_heads, width, Rope(theta=theta), vocab_size=vocab, rms_norm_eps=eps,
        max_position_embeddings=131072, bos_token_id=151646, eos_token_id=151643, qkv_bias=True,
        assumed=("theta", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"),
    )  # fmt: skip


def _llama(name: str, layers: int, hidden: int, heads: int, width: int) -> ModelConfig:
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    return _dense(
        name, layers, hidden, heads, 8, width, Rope(theta=500000.0, scaling=scaling), vocab_size=128256,
        rms_norm_eps=1e-5, max_position_embeddings=131072, bos_token_id=128000, eos_token_id=128001,
        assumed=("theta", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"),
    )  # fmt: skip


_MEMBERS: dict[str, Callable[[str], ModelConfig]] = {
    "deepseek-llm-7b": lambda name: _dense(name, 30, 4096, 32, 32, 11008, **_LLM),
    "deepseek-llm-67b": lambda name: _dense(name, 95, 8192, 64, 8, 22016, **_LLM),
    "deepseek-moe-2b": _moe_2b,
    "deepseek-moe-16b": _moe_16b,
    "deepseek-moe-145b": _moe_145b,
    "deepseek-coder-1.3b": lambda name: _coder(name, 24, 2048, 16, 16, 5504),
    "deepseek-coder-6.7b": lambda name: _coder(name, 32, 4096, 32, 32, 11008),
    "deepseek-coder-33b": lambda name: _coder(name, 62, 7168, 56, 8, 19200),
    "deepseek-math-7b": lambda name: _dense(name, 30, 4096, 32, 32, 11008, **_LLM),
    "deepseek-v2-lite": _v2_lite,
    "deepseek-v2": _v2,
    "deepseek-v2.5": _v2,
    "deepseek-coder-v2-lite": _v2_lite,
    "deepseek-coder-v2": _v2,
    "deepseek-v3": _v3,
    "deepseek-r1-zero": _v3,
    "deepseek-r1": _v3,
    "deepseek-v3.1": _v3,
    "deepseek-r1-distill-qwen-1.5b": lambda name: _qwen(name, 28, 1536, 12, 2, 8960, 151936, 1e4, 1e-6),
    "deepseek-r1-distill-qwen-7b": lambda name: _qwen(name, 28, 3584, 28, 4, 18944, 152064, 1e4, 1e-6),
    "deepseek-r1-distill-qwen-14b": lambda name: _qwen(name, 48, 5120, 40, 8, 13824, 152064, 1e6, 1e-5),
    "deepseek-r1-distill-qwen-32b": lambda name: _qwen(name, 64, 5120, 40, 8, 27648, 152064, 1e6, 1e-5),
    "deepseek-r1-distill-llama-8b": lambda name: _llama(name, 32, 4096, 32, 14336),
    "deepseek-r1-distill-llama-70b": lambda name: _llama(name, 80, 8192, 64, 28672),
}

_KINDS = {
    "deepseek-llm": "deepseek-llm-7b",
    "deepseek-llm-gqa": "deepseek-llm-67b",
    "deepseek-coder": "deepseek-coder-33b",
    "deepseek-moe": "deepseek-moe-16b",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-v2": "deepseek-v2",
    "deepseek-v3": "deepseek-v3",
    "deepseek-r1-distill-qwen": "deepseek-r1-distill-qwen-7b",
    "deepseek-r1-distill-llama": "deepseek-r1-distill-llama-8b",
}
"""A tiny twin of each kind is the member named here with its sizes shrunk: `<kind>-nano` and `<kind>-micro`."""


def _shrink(member: ModelConfig, name: str, *, nano: bool) -> ModelConfig:
    """The twin: same parts, gates and losses, small sizes, float32 compute, 4,096-token original context cut alike."""
    width, layers, vocab, context = (128, 3, 2048, 1024) if nano else (32, 3, 256, 128)
    attention, ffn, rope = member.attention, member.ffn, member.rope
    head = width // 4
    if isinstance(attention, GQA):
        grouped = attention.num_key_value_heads < attention.num_attention_heads
        attention = replace(attention, num_attention_heads=4, num_key_value_heads=2 if grouped else 4, head_dim=head)
    else:
        attention = replace(
            attention, num_attention_heads=4, q_lora_rank=None if attention.q_lora_rank is None else width * 3 // 4,
            kv_lora_rank=width // 2, qk_nope_head_dim=head, qk_rope_head_dim=head // 2, v_head_dim=head,
        )  # fmt: skip
    if isinstance(ffn, MoE):
        groups = 4 if ffn.n_group > 1 else 1
        ffn = replace(
            ffn, intermediate_size=width * 3, moe_intermediate_size=width * 3 // 4, n_routed_experts=16 if nano else 8,
            num_experts_per_tok=4 if nano else 2, n_group=groups,
            topk_group=groups if ffn.topk_group == ffn.n_group else groups // 2, first_k_dense_replace=1,
        )  # fmt: skip
    else:
        ffn = Dense(intermediate_size=width * 3)
    if isinstance(rope.scaling, YarnScaling | Llama3Scaling):
        rope = replace(rope, scaling=replace(rope.scaling, original_max_position_embeddings=context // 4))
    return replace(
        member, name=name, vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, attention=attention, ffn=ffn,
        rope=rope, max_position_embeddings=context, bos_token_id=0, eos_token_id=1, initializer_range=0.02,
        dtype="float32", assumed=(),
    )  # fmt: skip


def list_configs() -> list[str]:
    """Names that `get_config` knows: published members first, then the tiny twins."""
    return [*_MEMBERS, *(f"{kind}-{size}" for kind in _KINDS for size in ("nano", "micro"))]


def get_config(name: str) -> ModelConfig:
    """Configuration of a member of the family by name.

    Raises:
        ValueError: no such member; the message names the closest ones.
    """
    if name in _MEMBERS:
        return _MEMBERS[name](name)
    kind, _, size = name.rpartition("-")
    if size in ("nano", "micro") and kind in _KINDS:
        return _shrink(get_config(_KINDS[kind]), name, nano=size == "nano")
    import difflib

    close = difflib.get_close_matches(name, list_configs(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `deepseek-jax models`"
    raise ValueError(f"no model is named {name!r}: {hint}")
