"""FLOPs of a training step: against XLA's own count, the parameters, published figures; peaks of devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import deepseek_jax as dsj
from deepseek_jax.config import GQA, Dense
from deepseek_jax.metrics.flops import forward_flops_per_token, mfu, peak_flops, train_flops_per_token


@pytest.mark.parametrize("kind", ["llm", "llm-gqa", "v2-lite", "v3"])
def test_forward_flops_are_those_that_xla_counts(kind):
    """Of a dense unrolled model, attention over the whole square, as the reference on the CPU computes it."""
    model = dsj.get_config(f"deepseek-{kind}-micro")
    sizes = (
        dict(head_dim=64)
        if isinstance(model.attention, GQA)
        else dict(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=48)
    )
    model = replace(
        model, hidden_size=512, attention=replace(model.attention, **sizes), ffn=Dense(intermediate_size=1024),
        vocab_size=1024, scan_layers=False, num_nextn_predict_layers=0,
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    module = dsj.DeepSeek(model)
    variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
    cost = jax.jit(module.apply).lower(variables, tokens).cost_analysis()
    if cost is None:
        pytest.skip(f"XLA counts no FLOPs before compilation on {jax.default_backend()}")
    counted = 2 * 64 * sum(forward_flops_per_token(model, 64, causal=False).values())
    assert counted <= cost["flops"] <= 1.02 * counted, "XLA also counts norms, rope and softmax"


@pytest.mark.parametrize("name", ["deepseek-llm-67b", "deepseek-moe-16b", "deepseek-v2-lite", "deepseek-v3"])
def test_products_with_weights_are_two_flops_an_active_parameter(name):
    model = dsj.get_config(name)
    parts = forward_flops_per_token(model, 4096)
    weights = sum(parts[part] for part in ("projections", "feed_forward", "router", "head"))
    active = dsj.count_params(model).active_without_embedding
    assert weights == pytest.approx(2 * active, rel=1e-3), "but norms"


def test_published_figures():
    """6 N of LLM 7B and half its attention; V3's 250 GFLOP a token, 260 with its multi-token module (Megatron-Bridge)."""
    llm = dsj.get_config("deepseek-llm-7b")
    matrices = 30 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 102400
    assert train_flops_per_token(llm, 4096) == 6 * matrices + 6 * 30 * 4096 * 4096
    v3 = dsj.get_config("deepseek-v3")
    assert train_flops_per_token(replace(v3, num_nextn_predict_layers=0), 4096) == pytest.approx(250.4e9, rel=1e-3)
    assert train_flops_per_token(v3, 4096) == pytest.approx(260.6e9, rel=1e-3)


def test_attention_counts_half_of_the_square():
    model = dsj.get_config("deepseek-llm-7b")
    causal, whole = (forward_flops_per_token(model, 4096, causal=causal) for causal in (True, False))
    assert whole["scores"] == 2 * causal["scores"]
    assert {**whole, "scores": 0} == {**causal, "scores": 0}


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12, 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12, 756.5e12),
        ("NVIDIA H200", 989.5e12, 989.5e12),
        ("NVIDIA GH200 480GB", 989.5e12, 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12),
        ("NVIDIA B200", 2250e12, 2250e12),
        ("NVIDIA L4", 121e12, 121e12),
        ("NVIDIA L40S", 362e12, 362e12),
        ("Tesla T4", None, 65e12),
        ("Tesla V100-SXM2-16GB", None, 125e12),
        ("TPU v4", 275e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5p", 459e12, None),
        ("TPU v6 lite", 918e12, None),
        ("cpu", None, None),
        ("", None, None),
    ],
)
def test_peaks(kind, bfloat16, float16):
    assert peak_flops(kind) == bfloat16
    assert peak_flops(kind, "float16") == float16
    assert peak_flops(kind, "float32") is None


def test_mfu():
    assert mfu(1543.0, 250.4e9, 1, 989.5e12) == pytest.approx(0.39, abs=0.001), "V3 itself, by its GPU hours"
    assert mfu(2000.0, 1e9, 4, 1e12) == 0.5
    assert mfu(2000.0, 1e9, 4, None) is None
