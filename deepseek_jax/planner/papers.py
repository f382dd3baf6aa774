"""The bookkeeping of the papers: hours and money of V3, V2, 67B and R1, bytes of caches, scaling laws of the LLM paper.

Printed figures are constants with their place; everything else is computed from the registry's models, so that a test can
hold one to the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepseek_jax import hardware
from deepseek_jax.config import ModelConfig
from deepseek_jax.layers.cache import cache_shapes
from deepseek_jax.metrics.flops import forward_flops_per_token

H800_DOLLARS = 2.0
"""A GPU hour, as V3's table 1 assumes it."""

V3_HOURS = {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
"""H800 hours (V3, table 1)."""
V3_TOKENS, V3_GPUS = 14.8e12, 2048
V3_HOURS_PER_TRILLION = 180_000
"""V3, section 1: 3.7 days on 2,048 H800."""
V2_HOURS_PER_TRILLION, LLM_67B_HOURS_PER_TRILLION = 172_800, 300_600
"""V2, section 3.2.3."""
R1_HOURS = {"R1-Zero": 101_000, "SFT data": 5_000, "R1": 41_000}
"""H800 hours (R1 in Nature, supplementary table 7)."""
V2_CACHE_BITS, LLM_67B_CACHE_BITS = 6, 16
"""Of an entry, in deployment (V2, section 3.2.3: V2's cache is quantised to 6 bits on average)."""


def dollars(hours: dict[str, int]) -> dict[str, float]:
    """Money of each stage at the paper's price."""
    return {name: count * H800_DOLLARS for name, count in hours.items()}


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """What hours a trillion tokens imply."""

    tokens_per_second: float
    """Of one GPU."""
    flops_per_second: float
    """Of one GPU, in model FLOPs (metrics/flops.py)."""
    mfu: float
    """Of the GPU's bfloat16 peak."""


def implied(model: ModelConfig, hours_per_trillion: float, seq_len: int = 4096, *, mtp: bool = False) -> Utilisation:
    """Speed of an H800 that trains `model` at so many GPU hours a trillion tokens.

    Args:
        model: what is trained.
        hours_per_trillion: GPU hours.
        seq_len: tokens of a sequence; attention is causal.
        mtp: count the multi-token module's FLOPs too.
    """
    parts = forward_flops_per_token(model, seq_len)
    flops = 3 * sum(value for name, value in parts.items() if mtp or name != "mtp")
    rate = 1e12 / (hours_per_trillion * 3600)
    peak = hardware.by_name("h800").bf16
    assert peak is not None
    return Utilisation(tokens_per_second=rate, flops_per_second=rate * flops, mfu=rate * flops / peak)


def cache_numbers_per_token(model: ModelConfig) -> int:
    """Numbers that a token leaves in all layers' caches (V2, table 1): 2 n_h d_h l for MHA, 2 n_g d_h l for GQA,
    (d_c + d_h^R) l for MLA."""
    return model.num_hidden_layers * sum(math.prod(shape) for shape, _ in cache_shapes(model.attention, 1, 1).values())


def cache_reduction(
    model: ModelConfig, other: ModelConfig, bits: float = 16, other_bits: float = 16
) -> float:  # fmt: skip
    """Share by which a token's cache of `model` is smaller than that of `other`."""
    return 1 - cache_numbers_per_token(model) * bits / (cache_numbers_per_token(other) * other_bits)


# DeepSeek LLM, section 3 (arXiv 2401.02954). C: FLOPs of a run, M: non-embedding FLOPs a token, D: tokens, C = M · D.


def model_scale(layers: int, width: int, seq_len: int) -> float:
    """M = 72 L d² + 12 L d l (eq. 2)."""
    return 72 * layers * width**2 + 12 * layers * width * seq_len


def kaplan_scale(layers: int, width: int, vocab: int | None = None) -> float:
    """6 N₁ = 72 L d², and with a vocabulary 6 N₂ = 6 N₁ + 6 V d (eq. 2): what others took for FLOPs a token. Returns N."""
    return 12 * layers * width**2 + (0 if vocab is None else vocab * width)


def best_learning_rate(compute: float) -> float:
    """η = 0.3118 C^−0.1250 (eq. 1)."""
    return 0.3118 * compute**-0.1250


def best_batch(compute: float) -> float:
    """Tokens of a step: B = 0.2920 C^0.3271 (eq. 1)."""
    return 0.2920 * compute**0.3271


def best_model(compute: float) -> float:
    """M = 0.1715 C^0.5243 (eq. 4)."""
    return 0.1715 * compute**0.5243


def best_data(compute: float) -> float:
    """Tokens: D = 5.8316 C^0.4757 (eq. 4)."""
    return 5.8316 * compute**0.4757
