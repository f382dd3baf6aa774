"""Random shapes against transformers itself, so that the committed goldens are not the only truth.

Skipped where torch or a transformers with multi-token modules and the −inf mask (5.23) is missing: the `parity` extra.
"""

import json

import jax
import numpy as np
import pytest
from hf_weights import hf_to_model_config, hf_to_variables
from parity import relative, with_target

import deepseek_jax as dsj

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def random_config(goldens, family: str, draw: np.random.Generator) -> dict:
    """A config.json of this family with sizes and rules drawn at random."""

    def pick(*values):
        return values[draw.integers(len(values))]

    heads = pick(2, 4)
    config = dict(
        vocab_size=pick(31, 50), hidden_size=heads * pick(8, 12), intermediate_size=pick(20, 37),
        num_hidden_layers=pick(2, 3), num_attention_heads=heads,
        num_key_value_heads=heads if "deepseek" in family else pick(1, 2), rms_norm_eps=1e-6,
    )  # fmt: skip
    if family == "llama":
        llama3 = dict(
            factor=4.0, low_freq_factor=1.0, high_freq_factor=pick(2.0, 4.0), rope_type="llama3",
            original_max_position_embeddings=pick(32, 128),
        )  # fmt: skip
        scaling = pick(None, dict(type="linear", factor=pick(2.0, 4.0)), llama3)
        return goldens.LLAMA | config | dict(rope_scaling=scaling, rope_theta=pick(10000.0, 500000.0))
    if family == "qwen2":
        return goldens.QWEN2 | config | dict(tie_word_embeddings=pick(True, False), rope_theta=pick(1e4, 1e6))
    groups = pick(1, 2, 4)
    kept = 1 if groups == 1 else pick(1, 2) if groups == 4 else 1
    original, factor, mscale = pick(64, 512), pick(4, 40), pick(0.707, 1.0)
    yarn = dict(
        type="yarn", factor=factor, beta_fast=32, beta_slow=1, mscale=pick(mscale, 0.9), mscale_all_dim=mscale,
        original_max_position_embeddings=original,
    )  # fmt: skip
    config |= dict(
        q_lora_rank=pick(None, 14), kv_lora_rank=pick(10, 16), qk_nope_head_dim=pick(6, 10),
        qk_rope_head_dim=pick(4, 8), v_head_dim=pick(5, 12), moe_intermediate_size=pick(8, 11), n_routed_experts=12,
        n_shared_experts=pick(1, 2), num_experts_per_tok=pick(2, 3), first_k_dense_replace=1, n_group=groups,
        topk_group=kept, rope_scaling=pick(None, yarn), max_position_embeddings=original * factor,
    )  # fmt: skip
    if family == "deepseek_v2":
        method = "greedy" if groups == 1 else "group_limited_greedy"
        return goldens.DEEPSEEK_V2 | config | dict(topk_method=method, routed_scaling_factor=pick(1.0, 4.0))
    return goldens.DEEPSEEK_V3 | config | dict(num_nextn_predict_layers=pick(1, 2), norm_topk_prob=pick(True, False))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v2", "deepseek_v3"])
def test_random_shapes_equal_transformers(goldens, family, seed, tmp_path):
    draw = np.random.default_rng(seed)
    published = random_config(goldens, family, draw)
    for attempt in range(20):
        weights = goldens.random_weights(published, 100 * seed + attempt, [(-0.4, 0.4), (-3.0, -1.5)][seed % 2])
        goldens.write_checkpoint(tmp_path, published, weights)
        tokens = draw.integers(0, published["vocab_size"], (2, 29), dtype=np.int32)
        truth = goldens.transformers_logits(tmp_path, tokens)
        if truth["margin"] > 2e-5:
            break
    config = hf_to_model_config(json.loads((tmp_path / "config.json").read_text()))
    out = jax.jit(dsj.DeepSeek(config).apply)(hf_to_variables(weights, config), tokens)
    assert relative(out.logits, truth["logits"]) < 1e-5
    for depth in range(1, config.num_nextn_predict_layers + 1):
        assert relative(with_target(out.mtp_logits, depth), with_target(truth["mtp_logits"], depth)) < 1e-5
