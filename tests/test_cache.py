"""Cached inference against the full forward pass: prefill, chunks, decoding, ragged batches, and what a cache weighs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import micro, random_tokens, random_variables, run_config, variables_on
from marks import needs_8

import deepseek_jax as dsj
from deepseek_jax.layers.experts import few_tokens_experts, routed_experts
from deepseek_jax.models.cached import extend, init_cache, unstack
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh
from deepseek_jax.platform import compile_for

KINDS = ("llm-gqa", "v2-lite", "v3")  # GQA and MLA, with and without a query latent, both gates
PLACES = 29  # no dim of the models


@pytest.mark.parametrize(
    "kind, looped, platform",
    [(kind, False, "cpu") for kind in KINDS] + [("llm-gqa", True, "cpu"), ("v3", True, "cpu"), ("v3", True, "tpu")],
)
def test_prefill_chunks_and_decoding_equal_the_full_pass(kind, looped, platform):
    """Rows of 13, 6 and 1 tokens: prefilled to 8, 5, 1, extended by a padded chunk of 4, then token by token.

    Layers apart, and in a loop over their stacks; with caches as wide as they are, and as a TPU has them.
    """
    config = micro(kind, num_hidden_layers=4 if looped else 2, num_nextn_predict_layers=0)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    tokens = random_tokens(config, (3, 13))
    expected = model.apply(variables, tokens, method="hidden").hidden
    run = jax.jit(extend, static_argnums=(0, 5))
    weights = unstack(model, variables, looped=looped)
    with compile_for(platform):
        cache = init_cache(config, 3, PLACES, looped=looped)
    assert all(leaf.shape[-1] % 128 == 0 for leaf in jax.tree.leaves(cache)) == (platform == "tpu")
    done, total = np.zeros(3, np.int32), np.array([13, 6, 1])
    for width, wanted, fresh in (
        (8, [8, 5, 1], True),
        (4, [3, 1, 0], False),
        (1, [1, 0, 0], False),
        (1, [1, 0, 0], False),
    ):
        place = done[:, None] + np.arange(width)
        positions = np.where(np.arange(width) < np.array(wanted)[:, None], place, PLACES).astype(np.int32)
        new = np.take_along_axis(np.asarray(tokens), np.minimum(place, 12), axis=1)
        hidden, cache, _ = run(model, weights, jnp.asarray(new), jnp.asarray(positions), cache, fresh)
        for row, count in enumerate(wanted):
            np.testing.assert_allclose(
                hidden[row, :count], expected[row, done[row] : done[row] + count], rtol=1e-5, atol=1e-5
            )
        done = done + np.array(wanted)
    np.testing.assert_array_equal(done, total)


def test_bytes_of_a_cache():
    """V3: 576 numbers a token a layer in 2 bytes; LLM 67B: 2 · 8 heads of 128; MLA of V2's table 1: (d_c + d_h^R) l."""
    for name, numbers in (
        ("deepseek-v3", 576 * 61),
        ("deepseek-llm-67b", 2 * 8 * 128 * 95),
        ("deepseek-llm-7b", 2 * 32 * 128 * 30),
    ):
        cache = jax.eval_shape(lambda name=name: init_cache(dsj.get_config(name), 2, 100))
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) == 2 * 100 * numbers * 2, name


def test_absorbed_decoding_reads_the_latent_alone():
    """No key or value of a head, [.., S, N, ..], exists anywhere in a decoding step."""
    config = replace(micro("v3", num_hidden_layers=2), num_nextn_predict_layers=0)
    variables = random_variables(config)
    cache = init_cache(config, 1, PLACES)
    model = dsj.DeepSeek(config)
    jaxpr = jax.make_jaxpr(lambda w, c: extend(model, w, jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 5), c))(
        unstack(model, variables), cache
    )
    heads = config.attention.num_attention_heads
    text = str(jaxpr)
    assert f"1,{PLACES},{heads}," not in text and f"1,{heads},1,{PLACES}" in text.replace("1,1,", "1,")


@pytest.mark.parametrize(
    "platform, tokens, experts, served",
    [
        ("gpu", 1, 16, True), ("gpu", 3, 8, True), ("gpu", 6, 16, True), ("gpu", 40, 8, True), ("gpu", 40, 64, False),
        ("cpu", 1, 16, True), ("cpu", 16, 8, True), ("cpu", 17, 8, False),
    ],
)  # fmt: skip
def test_experts_of_few_tokens_equal_the_sorted_form(platform, tokens, experts, served):
    """The chosen ones as sums or products, or all of them; by the rules of each platform, on whatever runs the tests."""
    draw = np.random.default_rng(0)
    indices = jnp.asarray(np.stack([draw.permutation(experts)[:2] for _ in range(tokens)]))
    shapes = ((tokens, 12), (tokens, 2), (experts, 12, 6), (experts, 12, 6), (experts, 6, 12))
    x, weights, *matrices = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    with compile_for(platform):
        ours = few_tokens_experts(x, indices, weights, *matrices)
    assert (ours is not None) == served
    if ours is not None:
        np.testing.assert_allclose(ours, routed_experts(x, indices, weights, *matrices), rtol=1e-4, atol=1e-5)


def test_turned_matrices_give_the_same(monkeypatch):
    """What an engine of a few slots holds on a GPU: every matrix turned, small ones and experts."""
    config = micro("v3", num_hidden_layers=2)
    model, variables = dsj.DeepSeek(config), random_variables(config)
    tokens, places = random_tokens(config, (2, 7)), jnp.broadcast_to(jnp.arange(7), (2, 7))
    states = []
    for few_rows in (False, True):
        weights = unstack(model, variables, few_rows=few_rows)
        shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(weights)}
        states.append((extend(model, weights.turned_back(), tokens, places, init_cache(config, 2, 9))[0], shapes))
    np.testing.assert_allclose(states[0][0], states[1][0], rtol=1e-5, atol=1e-5)
    turned = {name for name, shape in states[0][1].items() if states[1][1][name] != shape}
    assert len(turned) > 20 and not any("embedding" in name for name in turned)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=needs_8)])
def test_turned_matrices_keep_their_shards(devices):
    """A run on one GPU samples from variables that lie on a mesh of one."""
    config = micro("v3", num_hidden_layers=2)
    run = run_config(config, mesh=MeshConfig(fsdp=devices))
    model, variables = dsj.DeepSeek(config), random_variables(config)
    placed = variables_on(make_mesh(run.mesh, jax.devices()[:devices]), run, variables)
    alone, turned = (unstack(model, tree, few_rows=True) for tree in (variables, placed))
    usual = unstack(model, placed)
    for (path, x), expected, before in zip(
        jax.tree.leaves_with_path(turned), jax.tree.leaves(alone), jax.tree.leaves(usual), strict=True
    ):
        np.testing.assert_array_equal(x, expected, err_msg=jax.tree_util.keystr(path))
        assert sorted(x.sharding.shard_shape(x.shape)) == sorted(before.sharding.shard_shape(before.shape)), path
    matrix = turned.layers[0]["params"]["attention"]["w_dq"]
    assert matrix.shape == usual.layers[0]["params"]["attention"]["w_dq"].shape[::-1]
