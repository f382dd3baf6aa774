"""Sequences split over devices: attention by a ring, the zig-zag order, and everything that looks at neighbours."""

import importlib
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_trees_close,
    loss_and_gradients,
    micro,
    random_tokens,
    random_variables,
    run_config,
    variables_on,
)
from marks import needs_8, study

import deepseek_jax as dsj
from deepseek_jax.config import MoE
from deepseek_jax.kernels.attention import attention_reference, splash_tpu
from deepseek_jax.kernels.attention.reference import Masks
from deepseek_jax.layers import context as layers_context
from deepseek_jax.layers.balance import within_capacity
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.mla import mla_absorbed, mla_expanded
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.ring import natural, ordered, zigzag
from deepseek_jax.training.begin import check_pieces
from deepseek_jax.training.loss import from_chunks, in_chunks
from deepseek_jax.training.step import place_batch

pytestmark = needs_8


def _mesh(**degrees):
    return make_mesh(MeshConfig(**{"data": 1, **degrees}), jax.devices()[: int(np.prod(list(degrees.values())))])


def _ids(shape, seed=0):
    """Documents of uneven lengths across all borders of chunks, padding behind them."""
    draw = np.random.default_rng(seed)
    ids = np.sort(draw.integers(1, 5, shape), axis=1)
    return jnp.asarray(np.where(np.arange(shape[1]) < shape[1] - draw.integers(0, 5, (shape[0], 1)), ids, 0), jnp.int32)


def test_order_and_back():
    """`zigzag` gives each shard an early and a late chunk; `natural` undoes it for split arrays."""
    x = jnp.arange(2 * 16 * 3).reshape(2, 16, 3)
    np.testing.assert_array_equal(ordered(x, 2, 1)[0, :, 0] // 3, [0, 1, 2, 3, 12, 13, 14, 15, *range(4, 12)])
    for shards in (2, 4, 8):
        mesh = _mesh(context=shards)
        with use_mesh(mesh):
            back = jax.jit(lambda x: natural(zigzag(x, "none", "length", "none"), "none", "length", "none"))(x)
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    "kind, layout, segments",
    [
        ("gqa", dict(context=4, tensor=2), True),
        ("gqa", dict(context=8), False),
        ("expanded", dict(data=2, context=2, tensor=2), True),
        ("absorbed", dict(context=4, tensor=2), True),
    ],
)
def test_ring_is_attention_in_float64(kind, layout, segments, monkeypatch):
    """Value and all gradients of the ring against the whole score matrix on one device."""
    monkeypatch.setattr(layers_context, "attention", attention_reference)
    B, T, N, C, P, R, V = 2, 32, 4, 6, 4, 2, 5
    with jax.enable_x64(True):
        draw = np.random.default_rng(3)
        latent = [(B, T, N, P), (B, T, N, R), (B, T, C), (B, T, R), (C, N, P), (C, N, V)]
        shapes = [(B, T, N, P), (B, T, 2, P), (B, T, 2, V)] if kind == "gqa" else latent
        arrays = [jnp.asarray(draw.standard_normal(shape)) for shape in shapes]
        weights = jnp.asarray(draw.standard_normal((B, T, N, V)))
        ids = _ids((B, T)) if segments else None
        functions: dict[str, Any] = dict(gqa=layers_context.attend, expanded=mla_expanded, absorbed=mla_absorbed)

        def gradients(split, joined):
            def objective(*arrays):
                context = Context(
                    cos=weights,
                    sin=weights,
                    valid=weights,
                    exempt=None,
                    segment_ids=None if ids is None else split(ids),
                )
                out = joined(functions[kind](*(split(x) if x.shape[1] == T else x for x in arrays), context, 0.7))
                return (out * weights).sum(), out

            return jax.jit(jax.value_and_grad(objective, argnums=tuple(range(len(arrays))), has_aux=True))(*arrays)

        expected = gradients(lambda x: x, lambda x: x)
        with use_mesh(_mesh(**layout)):
            actual = gradients(
                lambda x: ordered(x, layout["context"], 1),
                lambda x: natural(x, "batch", "length", "act_heads", "head_dim"),
            )
        assert_trees_close(actual, expected, rtol=1e-12)


def _moe_only(kind, **fields):
    """One MoE layer, and the multi-token module where the kind has one."""
    config = micro(kind, num_hidden_layers=1)
    return replace(config, ffn=replace(config.ffn, first_k_dense_replace=0, **fields))


_MODELS = {
    "llm-gqa": micro("llm-gqa", num_hidden_layers=1),
    "v2": _moe_only("v2"),
    "v3": _moe_only("v3", expert_loss_alpha=0.1, sequence_loss_alpha=0.1),
}


@pytest.mark.parametrize(
    "name, layout",
    [
        ("llm-gqa", dict(context=8)),
        study("v2", dict(context=4)),
        study("v3", dict(fsdp=2, context=2, tensor=2)),
    ],
)
def test_a_step_has_the_numbers_of_one_device(name, layout):
    """Loss, its parts, loads, every gradient: packed documents with padding, a mask of what is learned."""
    run = run_config(_MODELS[name], seq_len=32, batch_size=4, loss_chunk=8)
    variables, shape = random_variables(run.model), (4, 33)
    batch = {
        "tokens": random_tokens(run.model, shape),
        "segment_ids": _ids(shape),
        "loss_mask": jnp.asarray(np.random.default_rng(5).random(shape) < 0.8),
    }
    expected = jax.jit(partial(loss_and_gradients, run))(variables, batch)
    mesh = _mesh(**layout)
    with use_mesh(mesh):
        actual = jax.jit(partial(loss_and_gradients, run))(variables_on(mesh, run, variables), place_batch(batch, mesh))
    assert_trees_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llm-gqa", "v2"])
def test_no_device_holds_a_whole_sequence(kind):
    """After partitioning, no array of numbers (other than ids and masks) has a dim as long as the sequence."""
    config = micro(kind, num_hidden_layers=1)
    T, shards = 104, 4
    run = run_config(config, seq_len=T, batch_size=2, loss_chunk=52)
    mesh, variables = _mesh(context=shards, fsdp=2), random_variables(config)
    with use_mesh(mesh):
        batch = {"tokens": random_tokens(config, (2, T + 1))}
        placed = variables_on(mesh, run, variables)
        program = jax.jit(partial(loss_and_gradients, run)).lower(placed, place_batch(batch, mesh)).compile()
    text = program.as_text() or ""
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    assert any(T // shards in shape for shape in shapes)
    assert not [shape for shape in shapes if len(shape) > 2 and T in shape]


def test_a_user_of_split_sequences_sees_the_natural_order():
    """Logits, whatever the mesh does inside."""
    config = micro("v2", num_hidden_layers=1)  # dense
    variables, tokens = random_variables(config), random_tokens(config, (2, 16))
    model = dsj.DeepSeek(config)
    expected = jax.jit(model.apply)(variables, tokens)
    with use_mesh(_mesh(context=4)):
        actual = jax.jit(model.apply)(variables, tokens)
    assert_trees_close(actual.logits, expected.logits, rtol=1e-5)


@pytest.mark.parametrize("places", [16, 40])
def test_chunks_have_a_part_of_every_shard(places):
    x = jnp.arange(2 * places * 3).reshape(2, places, 3)
    for mesh in (None, _mesh(context=4)):
        with use_mesh(mesh) if mesh else nullcontext():
            pieces = in_chunks(x, 12)
            assert pieces.shape[2] == 12
            np.testing.assert_array_equal(from_chunks(pieces, places), x)
    rows = pieces[0, 0, :, 0].reshape(4, 3) // 3
    np.testing.assert_array_equal(rows, np.arange(4)[:, None] * (places // 4) + np.arange(3))


def test_lengths_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="RunConfig.seq_len = 100.*2 × context = 16.*96 or 112"):
        check_pieces(run_config(_MODELS["llm-gqa"], seq_len=100), _mesh(context=8))
    model, variables = dsj.DeepSeek(_MODELS["llm-gqa"]), random_variables(_MODELS["llm-gqa"])
    tokens = random_tokens(model.config, (1, 12))
    with use_mesh(_mesh(context=4)):
        with pytest.raises(ValueError, match="= 12 is not a multiple.* 8 or 16"):
            model.apply(variables, tokens)
        with pytest.raises(ValueError, match=r"MeshConfig.context = 4: inference with caches splits no sequence"):
            model.apply(variables, tokens, tokens, True, method="begin")


@pytest.mark.parametrize("causal, heads", [(True, 2), (False, 4)])
def test_parts_by_splash_weigh_and_differentiate_as_the_plain_ones(causal, heads):
    """The TPU's route for a part of the keys, in the interpreter: rows without keys and padding weigh nothing."""
    plain = importlib.import_module("deepseek_jax.kernels.attention.blockwise")
    (B, T), N, (H, V) = (1, 256), 4, (24, 16)
    draw = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, heads, H), (B, T, heads, V), (B, T, N, V))
    q, k, v, d_out = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)
    ids = _ids((B, T))
    masks = Masks(
        scale=0.3, causal=causal, q_segment_ids=ids, kv_segment_ids=ids if causal else jnp.where(ids > 2, 0, ids)
    )
    expected, lse = plain.block_forward(q, k, v, masks)
    out, splash_lse = splash_tpu.block_forward(q, k, v, masks, interpret=True)
    shares = [jnp.exp(jnp.maximum(x, -1e30)).swapaxes(1, 2)[..., None] for x in (lse, splash_lse)]
    assert_trees_close((shares[1], out * shares[1]), (shares[0], expected * shares[0]), rtol=2e-6)
    whole = (q, k, v, expected, jnp.maximum(lse, 0) + 0.5, d_out)  # of more keys than these
    assert_trees_close(
        splash_tpu.block_backward(*whole, masks, interpret=True), plain.block_backward(*whole, masks), rtol=2e-6
    )


def test_capacity_drops_the_last_tokens_of_the_sequence_among_equals():
    """V2's dropping, with every affinity equal: what lies last in a shard is not what comes last."""
    config = _MODELS["v2"].ffn
    assert isinstance(config, MoE)
    B, T, X = 2, 16, config.num_experts_per_tok
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 3, (B, T, X)))

    def kept(indices):
        return within_capacity(jnp.ones((B, T, X)), indices, jnp.ones((B, T), bool), jnp.zeros(B, bool), config)

    expected = kept(indices)
    assert 0 < expected.sum() < expected.size
    with use_mesh(_mesh(context=4)):
        actual = jax.jit(kept)(ordered(indices, 4, 1))
    np.testing.assert_array_equal(actual, ordered(expected, 4, 1))
