"""The family by name: parameter counts equal the published ones, by abstract evaluation."""

import time

import jax
import jax.numpy as jnp
import pytest
from helpers import run_config

import deepseek_jax as dsj
from deepseek_jax.training.state import abstract_state
from deepseek_jax.training.step import make_train_step

EXACT = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_404_352,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
}
# Billions as printed: total, active, relative tolerance.
PRINTED = {
    "deepseek-llm-7b": (6.910, 6.910, 1e-3),
    "deepseek-llm-67b": (67.425, 67.425, 1e-4),
    "deepseek-moe-2b": (2.0, 0.3, 0.1),
    "deepseek-moe-16b": (16.3757, 2.8287, 1e-4),
    "deepseek-moe-145b": (144.6, 22.2, 5e-3),
    "deepseek-coder-1.3b": (1.346, 1.346, 1e-3),
    "deepseek-coder-6.7b": (6.741, 6.741, 1e-3),
    "deepseek-coder-33b": (33.343, 33.343, 1e-4),
    "deepseek-v2-lite": (15.7, 2.661, 1e-3),
    "deepseek-v2": (236, 21.376, 2e-3),
    "deepseek-v3": (671, 37.552, 1e-3),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_totals(name):
    assert dsj.count_params(dsj.get_config(name)).main == EXACT[name]


@pytest.mark.parametrize("name", PRINTED)
def test_printed_totals(name):
    counts, (total, active, tolerance) = dsj.count_params(dsj.get_config(name)), PRINTED[name]
    assert counts.main / 1e9 == pytest.approx(total, rel=min(tolerance, 0.02))
    assert counts.active / 1e9 == pytest.approx(active, rel=tolerance)


def test_v3_biases_and_multi_token_module():
    counts = dsj.count_params(dsj.get_config("deepseek-v3"))
    assert counts.router_bias == 14_848
    assert (counts.mtp, counts.mtp_router_bias) == (11_610_067_968, 256)
    assert counts.active_without_embedding / 1e9 == pytest.approx(36.626, rel=1e-4)
    lite = dsj.count_params(dsj.get_config("deepseek-v2-lite"))
    assert lite.active_without_embedding / 1e9 == pytest.approx(2.451, rel=1e-3)


@pytest.mark.parametrize("alias", ["deepseek-r1", "deepseek-r1-zero", "deepseek-v3.1"])
def test_v3_is_shared(alias):
    from dataclasses import replace

    assert replace(dsj.get_config(alias), name="deepseek-v3") == dsj.get_config("deepseek-v3")


def test_unknown_name_suggests():
    with pytest.raises(ValueError, match="deepseek-v3-micro"):
        dsj.get_config("deepseek-v3-mikro")


@pytest.mark.parametrize("name", [name for name in dsj.list_configs() if name.endswith("-micro")])
def test_every_kind_runs(name):
    config = dsj.get_config(name)
    model = dsj.DeepSeek(config)
    tokens = jnp.arange(12).reshape(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    out = jax.jit(model.apply)(variables, tokens)
    assert out.logits.shape == (2, 6, config.vocab_size) and out.logits.dtype == jnp.float32
    assert out.mtp_logits.shape == (config.num_nextn_predict_layers, 2, 6, config.vocab_size)
    assert bool(jnp.isfinite(out.logits).all())
    for stats in out.router.values():
        assert stats.load.sum(axis=-1).tolist() == pytest.approx([12 * 2] * stats.load.shape[0], rel=0.2)


def test_apply_reads_the_router_collection_only():
    model = dsj.DeepSeek(dsj.get_config("deepseek-v3-micro"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    assert set(variables) == {"params", "router"}
    assert all(path[-1].key == "bias" for path, _ in jax.tree_util.tree_leaves_with_path(variables["router"]))
    _, changed = jax.jit(lambda v: model.apply(v, tokens, mutable=["router"]))(variables)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), changed["router"], variables["router"]))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (dict(tokens=jnp.zeros((2, 4))), "tokens must be integers"),
        (dict(tokens=jnp.zeros(4, jnp.int32)), "tokens must be integers"),
        (dict(tokens=jnp.zeros((1, 4), jnp.int32), segment_ids=jnp.ones((1, 5), jnp.int32)), "segment_ids must be"),
        (dict(tokens=jnp.zeros((1, 129), jnp.int32)), "max_position_embeddings = 128"),
    ],
)
def test_bad_input_is_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: dsj.DeepSeek(dsj.get_config("deepseek-v3-micro")).init(jax.random.key(0), **arguments))


def test_full_v3_is_abstract_and_traces():
    """State with optimizer as shapes, and the train step's jaxpr: no array of the 671B model is made.

    The limits asked for are 10 s and 20 s; asserted are ten times as much, since test machines are shared.
    """
    run = run_config(dsj.get_config("deepseek-v3"), batch_size=1, seq_len=4096, loss_chunk=512)
    start = time.perf_counter()
    state = abstract_state(run)
    state_seconds = time.perf_counter() - start
    batch = {"tokens": jax.ShapeDtypeStruct((1, 4097), jnp.int32)}
    start = time.perf_counter()
    jax.jit(make_train_step(run)).trace(state, batch)
    trace_seconds = time.perf_counter() - start
    print(f"abstract state {state_seconds:.1f} s, trace {trace_seconds:.1f} s")
    assert state_seconds < 100 and trace_seconds < 200
