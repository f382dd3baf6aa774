"""The model against transformers' golden files, and against the papers written out slowly (tests/literal).

The goldens hold the literal model too, so that what transformers lacks (DeepSeekMoE, packed documents, V2's token
dropping, balance losses) is held by something that itself was checked from outside.
"""

import dataclasses

import jax
import literal.attention
import literal.model
import numpy as np
import pytest
from literal.experts import best
from parity import (
    CASES,
    abstract_variables,
    load_golden,
    random_variables,
    relative,
    with_target,
)

import deepseek_jax as dsj
from deepseek_jax.layers.balance import exempt_sequences

SMOKE = ("llama_mha", "deepseek_v2", "deepseek_v3", "deepseek_v3_negative_bias")
EACH = [pytest.param(case, marks=pytest.mark.smoke if case in SMOKE else ()) for case in CASES]


def apply(config: dsj.ModelConfig, variables, tokens, **kwargs):
    """`DeepSeek.apply`, compiled in haste; `train` is static."""
    train = kwargs.pop("train", False)
    model = dsj.DeepSeek(config)
    run = jax.jit(lambda v, t, kw: model.apply(v, t, train=train, **kw))
    return run(variables, tokens, kwargs)


@pytest.mark.parametrize("case", EACH)
def test_logits_equal_transformers(case):
    golden = load_golden(case)
    out = jax.jit(dsj.DeepSeek(golden.config).apply)(golden.variables, golden.tokens)
    assert out.logits.dtype == np.float32
    assert out.mtp_logits.shape == golden.mtp_logits.shape
    assert relative(out.logits, golden.logits) < 1e-5
    for depth in range(1, golden.config.num_nextn_predict_layers + 1):
        assert relative(with_target(out.mtp_logits, depth), with_target(golden.mtp_logits, depth)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_parameter_tree_is_what_checkpoints_fill(case):
    golden = load_golden(case)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_variables(golden.config))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, golden.variables)


@pytest.mark.parametrize("case", CASES)
def test_literal_model_equals_transformers(case):
    golden = load_golden(case)
    truth = literal.model.run(golden.config, golden.variables, golden.tokens)
    assert relative(truth.logits, golden.logits) < 2e-6
    for depth in range(1, golden.config.num_nextn_predict_layers + 1):
        assert relative(with_target(truth.mtp_logits, depth), with_target(golden.mtp_logits, depth)) < 2e-6


@pytest.mark.parametrize("case", ["llama_llama3", "qwen2_tied", "deepseek_v2", "deepseek_v3", "deepseek_v3_no_groups"])
def test_float64_model_equals_literal_model(case):
    """With rounding out of the way nothing is left but the formulas."""
    golden = load_golden(case, dtype="float64")
    config = dataclasses.replace(golden.config, param_dtype="float64")
    truth = literal.model.run(config, golden.variables, golden.tokens)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), golden.variables)
        out = apply(config, variables, golden.tokens)
        assert out.logits.dtype == np.float64
        assert relative(out.logits, truth.logits) < 1e-12
        for depth in range(1, config.num_nextn_predict_layers + 1):
            assert relative(with_target(out.mtp_logits, depth), with_target(truth.mtp_logits, depth)) < 1e-12
        check_router(out.router, truth.router)


@pytest.mark.parametrize(
    ("case", "module", "name", "wrong"),
    [
        ("llama_gqa_linear", "attention", "frequencies", lambda rope, dim: plain(rope, dim)),
        ("llama_llama3", "attention", "frequencies", lambda rope, dim: plain(rope, dim)),
        ("deepseek_v2_lite", "attention", "frequencies", lambda rope, dim: plain(rope, dim)),
        ("deepseek_v3", "attention", "mla_softmax_scale", lambda dim, rope: dim**-0.5),
        ("deepseek_v3_negative_bias", "attention", "rope_amplitude", lambda rope: 1.0),
        ("deepseek_v2", "experts", "select_group_limited", lambda s, k, *groups: best(s, k)),
        ("deepseek_v3", "experts", "select_biased", lambda s, bias, k, *groups: best(s, k)),
        ("deepseek_v3_negative_bias", "experts", "inside_groups", lambda s, kept, groups: zero_fill(s, kept, groups)),
    ],
)
def test_goldens_would_show_a_mistake(case, module, name, wrong, monkeypatch):
    monkeypatch.setattr(f"literal.{module}.{name}", wrong)
    golden = load_golden(case)
    assert relative(literal.model.run(golden.config, golden.variables, golden.tokens).logits, golden.logits) > 0.1


def plain(rope, dim):
    return literal.attention.plain_frequencies(dim, rope.theta)


def zero_fill(scores, kept, groups):
    """What transformers did until 5.17."""
    return [score if any(i in groups[g] for g in kept) else 0.0 for i, score in enumerate(scores)]


# What transformers lacks, against the literal model

MHA = dsj.GQA(num_attention_heads=4, num_key_value_heads=4, head_dim=6)
LATENT = dsj.MLA(
    num_attention_heads=2, q_lora_rank=10, kv_lora_rank=9, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7
)
EXPERTS = dict(moe_intermediate_size=10, n_routed_experts=8, num_experts_per_tok=3, intermediate_size=30)
DEEPSEEK_MOE = dsj.ModelConfig(
    name="deepseek", vocab_size=61, hidden_size=22, num_hidden_layers=3, attention=MHA, rope=dsj.Rope(),
    max_position_embeddings=64, dtype="float32",
    ffn=dsj.MoE(
        **EXPERTS, n_shared_experts=2, first_k_dense_replace=1, scoring_func="softmax", topk_method="greedy",
        expert_loss_alpha=0.01,
    ),
)  # fmt: skip
DEEPSEEK_MOE_GROUPS = dataclasses.replace(
    DEEPSEEK_MOE,
    ffn=dataclasses.replace(
        DEEPSEEK_MOE.ffn, first_k_dense_replace=0, n_shared_experts=1, n_group=4, topk_group=4, device_loss_alpha=0.05
    ),
)
V2_TRAINING = dataclasses.replace(
    DEEPSEEK_MOE, name="v2", attention=LATENT, rope=dsj.Rope(interleaved=True),
    ffn=dsj.MoE(
        **EXPERTS, n_shared_experts=2, first_k_dense_replace=1, scoring_func="softmax",
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0, expert_loss_alpha=0.003,
        device_loss_alpha=0.05, communication_loss_alpha=0.02, capacity_factor=1.0, capacity_exempt_share=0.3,
    ),
)  # fmt: skip
V3_TRAINING = dataclasses.replace(
    V2_TRAINING, name="v3", num_nextn_predict_layers=2,
    ffn=dsj.MoE(
        **EXPERTS, n_shared_experts=1, first_k_dense_replace=1, scoring_func="sigmoid", topk_method="noaux_tc",
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5, sequence_loss_alpha=0.1,
    ),
)  # fmt: skip
DENSE_MTP = dataclasses.replace(
    DEEPSEEK_MOE, name="dense", num_nextn_predict_layers=1, tie_word_embeddings=True,
    attention=dataclasses.replace(MHA, num_key_value_heads=2, qkv_bias=True), ffn=dsj.Dense(intermediate_size=30),
)  # fmt: skip
PACKED = np.array(
    [
        [1] * 9 + [2] * 1 + [3] * 8 + [4] * 5,
        [1] * 14 + [2] * 5 + [0] * 4,
        [0] * 3 + [5] * 13 + [0] * 7,
        [7] * 23,
    ],
    np.int32,
)
"""Documents of one token, padding after, before and on both sides, a row without either."""


def check_router(ours, truth):
    """Loads exactly, balance losses and drops of every layer."""
    assert set(ours) == set(truth)
    for group, layers in truth.items():
        stats = ours[group]
        np.testing.assert_array_equal(np.asarray(stats.load), np.array([layer.load for layer in layers]))
        np.testing.assert_array_equal(np.asarray(stats.dropped), np.array([layer.dropped for layer in layers]))
        names = set().union(*(losses for layer in layers for losses in layer.losses))
        assert set(stats.balance_loss) == names
        for name in names:
            expected = np.array([[losses[name] for losses in layer.losses] for layer in layers])
            assert relative(stats.balance_loss[name], expected) < 1e-5


@pytest.mark.parametrize(
    ("config", "packed", "train"),
    [
        pytest.param(DEEPSEEK_MOE, False, False, id="deepseek", marks=pytest.mark.smoke),
        pytest.param(DEEPSEEK_MOE, True, False, id="deepseek packed"),
        pytest.param(DEEPSEEK_MOE_GROUPS, True, False, id="deepseek with device loss, packed"),
        pytest.param(V2_TRAINING, True, False, id="v2 packed"),
        pytest.param(V2_TRAINING, False, True, id="v2 dropping tokens"),
        pytest.param(V2_TRAINING, True, True, id="v2 packed dropping tokens"),
        pytest.param(V3_TRAINING, True, True, id="v3 packed"),
        pytest.param(DENSE_MTP, True, False, id="dense with multi-token module, packed"),
    ],
)
def test_model_equals_literal_model(config, packed, train):
    draw = np.random.default_rng(7)
    tokens = draw.integers(0, config.vocab_size, PACKED.shape, dtype=np.int32)
    variables = random_variables(config, 11)
    kwargs = {}
    if packed:
        starts = np.array([[np.argmax(row == segment) for segment in row] for row in PACKED])
        kwargs = {"segment_ids": PACKED, "positions": (np.arange(PACKED.shape[1]) - starts).astype(np.int32)}
    exempt = None
    if train:
        exempt = np.asarray(exempt_sequences(tokens, config.ffn.capacity_exempt_share))
    truth = literal.model.run(config, variables, tokens, exempt=exempt, **kwargs)
    out = apply(config, jax.tree.map(np.float32, variables), tokens, train=train, **kwargs)
    seen = PACKED != 0 if packed else np.ones(PACKED.shape, bool)
    assert relative(np.asarray(out.logits)[seen], truth.logits[seen]) < 1e-5
    if train and config is V2_TRAINING:
        assert exempt.any() and not exempt.all(), "the tokens drawn exempt all sequences or none"
        assert all(layer.dropped > 0 for layer in truth.router["moe_layers"])
    for ours, expected in zip(np.asarray(out.mtp_logits), truth.mtp_logits, strict=True):
        target = ~np.isnan(expected).any(axis=-1)
        assert target.any()
        assert relative(ours[target], expected[target]) < 1e-5
    check_router(out.router, truth.router)
