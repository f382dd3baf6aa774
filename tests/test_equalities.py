"""Every fast path equals its reference, in values and gradients: float64, so that only real differences show."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_tokens, random_variables, run_config
from jax.extend.core import jaxprs_in_params

import deepseek_jax as dsj
from deepseek_jax.kernels.attention import attention
from deepseek_jax.kernels.attention.blockwise import blockwise
from deepseek_jax.kernels.grouped_matmul import grouped_matmul
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.mla import MLAttention
from deepseek_jax.layers.rope import rope_tables
from deepseek_jax.models.block import Block
from deepseek_jax.training.loss import cross_entropy_sum, loss_parts, make_totals


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [8, 21])
def test_blockwise_attention(kv_heads, segments, causal, length):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, length, 4, 6), jnp.float64)
    k = jax.random.normal(keys[1], (2, length, kv_heads, 6), jnp.float64)
    v = jax.random.normal(keys[2], (2, length, kv_heads, 5), jnp.float64)
    cotangent = jax.random.normal(keys[3], (2, length, 4, 5), jnp.float64)
    ids = None
    if segments:  # two documents and padding in the first row, padding first in the second
        ids = jnp.stack([(jnp.arange(length) * 3) // length + 1, jnp.arange(length) // 3]).astype(jnp.int32)
        ids = ids.at[0, -2:].set(0)

    def run(function, **kwargs):
        def total(q, k, v):
            out = function(q, k, v, scale=0.4, causal=causal, q_segment_ids=ids, kv_segment_ids=ids, **kwargs)
            return (out * cotangent).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    expected = run(attention, implementation="reference")
    blocks = dict(block_q=8, block_k=4) if causal else dict(block_q=4, block_k=8)
    assert_trees_close(run(blockwise, **blocks), expected, rtol=1e-12)
    if segments:
        assert not np.any(expected[0][1][0, -2:]), "rows of padding are zero"


def test_blockwise_never_holds_the_score_matrix():
    """No array of the backward pass is as large as [T, S] scores."""
    T, block = 64, 8
    x = jnp.ones((1, T, 2, 4))
    gradient = jax.grad(lambda q, k, v: blockwise(q, k, v, scale=1.0, block_q=block, block_k=block).sum(), (0, 1, 2))
    sizes = [np.prod(v.aval.shape) for eqn in _equations(jax.make_jaxpr(gradient)(x, x, x).jaxpr) for v in eqn.outvars]
    assert max(sizes) < T * T


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@pytest.mark.parametrize("sizes", [[5, 0, 90, 1, 24], [0, 0, 0, 0, 0], [0, 0, 120, 0, 0], [30, 20, 10, 0, 7]])
def test_grouped_matmul_blocks(sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (120, 6), jnp.float64)
    w = jax.random.normal(keys[1], (5, 6, 7), jnp.float64)
    cotangent = jax.random.normal(keys[2], (120, 7), jnp.float64)
    group_sizes = jnp.array(sizes, jnp.int32)

    def run(implementation):
        def total(x, w):
            out = grouped_matmul(x, w, group_sizes, implementation=implementation)
            return (out * cotangent).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, w)

    actual, expected = run("blocks"), run("reference")
    assert_trees_close(actual, expected, rtol=1e-12)
    assert not np.any(actual[0][1][sum(sizes) :]), "rows past the groups are zero"


def _context(config, shape, segment_ids=None):
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    cos, sin = rope_tables(config.rope, config.attention.qk_rope_head_dim, positions, jnp.float64)
    return Context(cos=cos, sin=sin, segment_ids=segment_ids, valid=jnp.ones(shape, bool), exempt=None)


@pytest.mark.parametrize("kind", ["v2-lite", "v3"])
def test_mla_expanded_equals_absorbed(kind):
    config = micro(kind, dtype="float64", param_dtype="float64")
    x = jax.random.normal(jax.random.key(2), (2, 12, config.hidden_size), jnp.float64)
    params = jax.tree.map(lambda p: p[0], random_variables(config)["params"]["moe_layers"]["attention"])
    segment_ids = jnp.array([[1] * 5 + [2] * 7, [1] * 10 + [0] * 2], jnp.int32)

    def run(absorbed):
        layer = MLAttention(config.attention, config.rope, 1e-6, "float64", 0.02, absorbed)

        def total(params, x):
            out, _ = layer.apply({"params": params}, x, _context(config, (2, 12), segment_ids))
            return (out * jnp.cos(jnp.arange(config.hidden_size))).sum(), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, x)

    assert_trees_close(run(True), run(False), rtol=1e-11)


def _loss_and_gradient(config):
    run = run_config(config)
    variables = random_variables(config)
    batch = {"tokens": random_tokens(config, (4, 17))}
    totals = make_totals(batch, config.num_nextn_predict_layers, jnp.float64)

    def total(params):
        return loss_parts(run, params, variables.get("router", {}), batch, totals, 0.3)[0]

    return jax.value_and_grad(total), variables["params"]


@pytest.mark.parametrize("kind", ["llm", "v3"])
def test_scanned_equals_unrolled_and_remat_equals_none(kind):
    config = micro(kind, dtype="float64", param_dtype="float64")
    function, params = _loss_and_gradient(config)
    expected = jax.jit(function)(params)
    offload = {"remat": "offload"} if kind == "llm" else {"remat": "v3"}  # no matter of the layer: one kind will do
    for fields in ({"scan_layers": False}, {"remat": "full"}, offload):
        other, _ = _loss_and_gradient(replace(config, **fields))
        assert_trees_close(jax.jit(other)(params), expected, rtol=1e-11), fields


def test_stack_equals_a_loop_over_its_layers():
    config = micro("v3", dtype="float64", param_dtype="float64")
    variables = random_variables(config)
    tokens = random_tokens(config, (2, 12))
    model = dsj.DeepSeek(config)
    params = variables["params"]
    context = _context(config, (2, 12))

    @jax.jit
    def by_hand():
        x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
        for stack, moe, count in (("dense_layers", False, 1), ("moe_layers", True, 2)):
            for i in range(count):
                layer = {"params": jax.tree.map(lambda p, i=i: p[i], params[stack])}
                if moe:
                    layer["router"] = jax.tree.map(lambda p, i=i: p[i], variables["router"][stack])
                x, _ = Block(config, moe=moe).apply(layer, x, context)
        x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params["final_norm"]["scale"]
        return x @ params["head"]["w"]

    np.testing.assert_allclose(jax.jit(model.apply)(variables, tokens).logits, by_hand(), rtol=1e-10)


def test_remat_recomputes_what_it_says():
    """Matrix products in the gradient: full repeats all of a layer, V3's the two up-projections and no attention."""

    def products(**fields):
        function, params = _loss_and_gradient(micro("v3", dtype="float64", param_dtype="float64", **fields))
        return sum(eqn.primitive.name == "dot_general" for eqn in _equations(jax.make_jaxpr(function)(params).jaxpr))

    none, v3, full = products(), products(remat="v3"), products(remat="full")
    assert full - products(remat="offload") == 1  # the projection before the multi-token module's layer
    # Three up-projections (queries, keys, values) in each of the three layer kinds: dense, MoE, multi-token.
    assert v3 - none == 9
    assert full - v3 > 20


def test_offload_leaves_no_layers_input_on_the_device():
    """What the loop over layers hands to the backward pass: with "full" their inputs, [L, B, T, D]; else those of hosts."""

    def kept(remat):
        config = micro("v3", remat=remat, num_nextn_predict_layers=0, dtype="float64", param_dtype="float64")
        function, params = _loss_and_gradient(config)
        shape = (config.num_moe_layers, 4, 16, config.hidden_size)
        loops = [eqn for eqn in _equations(jax.make_jaxpr(function)(params).jaxpr) if eqn.primitive.name == "scan"]
        found = [var.aval for eqn in loops for var in eqn.outvars if var.aval.shape == shape]
        return ["host" in str(aval) for aval in found]

    assert kept("full") and not any(kept("full"))
    assert kept("offload") and all(kept("offload"))


@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_chunked_loss_equals_full(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 12, 8), jnp.float64)
    w = jax.random.normal(keys[1], (8, 50), jnp.float64)
    targets = jax.random.randint(keys[2], (3, 12), 0, 50)
    weights = jax.random.uniform(keys[3], (3, 12), jnp.float64) * (targets % 3 != 0)

    def full(hidden, w):
        logp = jax.nn.log_softmax(hidden @ w)
        return -(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights).sum()

    def chunked(hidden, w):
        return cross_entropy_sum(hidden, w, targets, weights, chunk)

    expected = jax.value_and_grad(full, (0, 1))(hidden, w)
    assert_trees_close(jax.value_and_grad(chunked, (0, 1))(hidden, w), expected, rtol=1e-12)
    assert_trees_close(chunked(hidden, w), expected[0], rtol=1e-12)


def test_chunked_loss_never_holds_the_logits():
    hidden, w, targets = jnp.ones((2, 64, 4)), jnp.ones((4, 100)), jnp.zeros((2, 64), jnp.int32)
    gradient = jax.grad(lambda h, w: cross_entropy_sum(h, w, targets, jnp.ones((2, 64)), 8), (0, 1))
    sizes = [
        np.prod(v.aval.shape) for eqn in _equations(jax.make_jaxpr(gradient)(hidden, w).jaxpr) for v in eqn.outvars
    ]
    assert max(sizes) < 2 * 64 * 100
