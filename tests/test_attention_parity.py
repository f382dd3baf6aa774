"""Norm, rope with its scalings, MHA/GQA and MLA against tests/literal/attention.py, on packed documents."""

import jax
import jax.numpy as jnp
import literal.attention as literal
import numpy as np
import pytest
from parity import relative

import deepseek_jax as dsj
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.gqa import GQAttention
from deepseek_jax.layers.mla import MLAttention
from deepseek_jax.layers.norm import rms_norm
from deepseek_jax.layers.rope import apply_rope, inverse_frequencies, rope_tables, softmax_scale

V2_YARN = dsj.YarnScaling(factor=40, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707)
V3_YARN = dsj.YarnScaling(factor=40, original_max_position_embeddings=4096)
SMALL_YARN = dsj.YarnScaling(factor=10, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=0.8)
LLAMA3 = dsj.Llama3Scaling(
    factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
)  # fmt: skip
ROPES = {
    "plain": (dsj.Rope(), 128),
    "linear, Coder": (dsj.Rope(theta=1e5, scaling=dsj.LinearScaling(factor=4)), 128),
    "llama3, R1-Distill-Llama": (dsj.Rope(theta=5e5, scaling=LLAMA3), 128),
    "yarn, V2": (dsj.Rope(interleaved=True, scaling=V2_YARN), 64),
    "yarn, V3": (dsj.Rope(interleaved=True, scaling=V3_YARN), 64),
    "yarn, both ends clamped": (
        dsj.Rope(scaling=dsj.YarnScaling(factor=4, original_max_position_embeddings=8, beta_slow=2.0)), 8,
    ),
    "yarn, factor 1": (dsj.Rope(scaling=dsj.YarnScaling(factor=1, original_max_position_embeddings=4096)), 64),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_the_literal_ones(name):
    rope, dim = ROPES[name]
    np.testing.assert_allclose(inverse_frequencies(rope, dim), literal.frequencies(rope, dim), rtol=1e-12)


def test_published_yarn_figures():
    """The ramp of 64 dims runs over pairs 10 to 23; softmax scales of V3 and V2 with 192 query dims."""
    plain, scaled = literal.plain_frequencies(64, 1e4), literal.frequencies(dsj.Rope(scaling=V3_YARN), 64)
    kept = [i for i in range(32) if scaled[i] == plain[i]]
    divided = [i for i in range(32) if np.isclose(scaled[i], plain[i] / 40, rtol=1e-12)]
    assert (kept, divided) == (list(range(11)), list(range(23, 32)))
    for yarn, scale in ((V3_YARN, 0.13523378), (V2_YARN, 0.11472139)):
        rope = dsj.Rope(interleaved=True, scaling=yarn)
        assert literal.mla_softmax_scale(192, rope) == pytest.approx(scale, rel=1e-7)
        assert softmax_scale(192, rope) == pytest.approx(scale, rel=1e-7)
        assert literal.rope_amplitude(rope) == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, SMALL_YARN], ids=["plain", "yarn with amplitude"])
def test_rotation_equals_the_literal_one(interleaved, scaling):
    rope = dsj.Rope(interleaved=interleaved, scaling=scaling)
    draw = np.random.default_rng(1)
    x = draw.normal(size=(2, 9, 3, 10))
    positions = draw.integers(0, 500, size=(2, 9))
    with jax.enable_x64(True):
        cos, sin = rope_tables(rope, 10, jnp.asarray(positions), "float64")
        ours = apply_rope(jnp.asarray(x), cos, sin, interleaved=interleaved)
    for b, t, n in np.ndindex(2, 9, 3):
        np.testing.assert_allclose(ours[b, t, n], literal.rotate(x[b, t, n], int(positions[b, t]), rope), rtol=1e-10)


def test_rms_norm_equals_the_literal_one():
    draw = np.random.default_rng(2)
    x, scale = draw.normal(size=(5, 33)) * [[1e-3], [1], [10], [1e3], [0]], draw.normal(size=33)
    ours = rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), 1e-6)
    truth = [literal.rms_norm(row, scale, 1e-6) for row in x]
    np.testing.assert_allclose(ours, truth, rtol=1e-5)


SEGMENTS = np.array([[1] * 6 + [2] * 1 + [3] * 6, [0] * 2 + [1] * 8 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(6), 0, *range(6)], [0, 0, *range(8), 0, 0, 0]], np.int32)
D = 18
MLA = dsj.MLA(
    num_attention_heads=3, q_lora_rank=9, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
GQA = dsj.GQA(num_attention_heads=4, num_key_value_heads=2, head_dim=6, qkv_bias=True)


def filled(draw: np.random.Generator, **shapes):
    """Random weights by shape; a name ending in norm is a norm."""
    return {
        name: {"scale": draw.uniform(0.5, 1.5, shape)} if name.endswith("norm") else draw.normal(0, 0.3, shape)
        for name, shape in shapes.items()
    }


def check(module, params, literal_layer, rope: dsj.Rope, rotated: int) -> None:
    """Module and literal layer on packed documents, in float64."""
    x = np.random.default_rng(4).normal(size=(*SEGMENTS.shape, D))
    with jax.enable_x64(True):
        cos, sin = rope_tables(rope, rotated, jnp.asarray(POSITIONS), "float64")
        segments = jnp.asarray(SEGMENTS)
        context = Context(cos=cos, sin=sin, segment_ids=segments, valid=segments != 0, exempt=None)
        ours, _ = jax.jit(module.apply)({"params": params}, jnp.asarray(x), context)
    for b in range(len(x)):
        seen = SEGMENTS[b] != 0
        truth = literal_layer(params, x[b], POSITIONS[b], SEGMENTS[b])
        assert relative(ours[b][seen], truth[seen]) < 1e-10


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("compressed", [True, False], ids=["query latent", "no query latent"])
def test_mla_equals_the_literal_layer(absorbed, compressed):
    rope, draw = dsj.Rope(interleaved=True, scaling=SMALL_YARN), np.random.default_rng(3)
    config = MLA if compressed else dsj.MLA(**{**vars(MLA), "q_lora_rank": None})
    query = dict(w_dq=(D, 9), q_norm=9, w_uq=(9, 3, 10)) if compressed else dict(w_q=(D, 3, 10))
    params = filled(
        draw, **query, w_dkv=(D, 8), kv_norm=8, w_kr=(D, 4), w_uk=(8, 3, 6), w_uv=(8, 3, 5), w_o=(3, 5, D)
    )  # fmt: skip
    module = MLAttention(config, rope, 1e-6, param_dtype="float64", stddev=1.0, absorbed=absorbed)
    for literal_form in (False, True):
        check(
            module, params, lambda p, *given, form=literal_form: literal.mla(p, *given, config, rope, 1e-6, absorbed=form),
            rope, 4,
        )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_gqa_equals_the_literal_layer(kv_heads):
    rope, draw = dsj.Rope(scaling=dsj.LinearScaling(factor=4)), np.random.default_rng(3)
    config = dsj.GQA(**{**vars(GQA), "num_key_value_heads": kv_heads})
    params = filled(
        draw, w_q=(D, 4, 6), w_k=(D, kv_heads, 6), w_v=(D, kv_heads, 6), w_o=(4, 6, D), b_q=(4, 6), b_k=(kv_heads, 6),
        b_v=(kv_heads, 6),
    )  # fmt: skip
    module = GQAttention(config, rope, param_dtype="float64", stddev=1.0)
    check(module, params, lambda p, *given: literal.gqa(p, *given, config, rope), rope, 6)
