"""The optimizer step: accumulation, meshes, the selection bias of the whole batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_tokens, run_config
from marks import needs_8, study

from deepseek_jax.layers.balance import exempt_sequences
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.training.begin import require_same
from deepseek_jax.training.bias import max_violation, updated_bias
from deepseek_jax.training.optimizer import decayed
from deepseek_jax.training.state import abstract_state, init_state
from deepseek_jax.training.step import compile_train_step, make_train_step, place_batch


def _batch(run, step=0, segments=False):
    batch = {"tokens": random_tokens(run.model, (run.batch_size, run.seq_len + 1), seed=100 + step)}
    if segments:
        ids = jnp.broadcast_to(jnp.arange(run.seq_len + 1) // 6 + 1, batch["tokens"].shape)
        rows = jnp.arange(run.batch_size)[:, None]
        batch["segment_ids"] = jnp.where(jnp.arange(run.seq_len + 1) < 5 + 2 * rows, ids, 0).astype(jnp.int32)
    return batch


def _small(kind, **fields):
    """One layer of experts, and V3's multi-token module with another: every program here compiles for long."""
    config = micro(kind, num_hidden_layers=1, initializer_range=0.2, **fields)
    return replace(config, ffn=replace(config.ffn, first_k_dense_replace=0))


def test_accumulated_equals_whole_batch():
    """Also where the pieces hold different numbers of documents and tokens."""
    with jax.enable_x64(True):
        run = run_config(_small("v3", dtype="float64", param_dtype="float64"))
        state, batch = init_state(run), _batch(run, segments=True)
        new, metrics = jax.jit(make_train_step(run))(state, batch)
        other, other_metrics = jax.jit(make_train_step(replace(run, accumulation=4)))(state, batch)
        assert_trees_close(other, new, rtol=1e-9)
        for name in ("loss", "loss_main", "loss_mtp", "loss_balance", "grad_norm"):
            np.testing.assert_allclose(other_metrics[name], metrics[name], rtol=1e-10)


def test_router_entropy_does_not_depend_on_accumulation():
    """A mean over tokens; here every other row is padding but for two."""
    run = run_config(_small("moe", dtype="float32"))
    state, batch = init_state(run), _batch(run)
    batch["segment_ids"] = jnp.ones_like(batch["tokens"]).at[1::2, 2:].set(0)
    (_, metrics), (_, other) = (
        jax.jit(make_train_step(replace(run, accumulation=accumulation)))(state, batch) for accumulation in (1, 2)
    )
    entropies = [m["router"]["moe_layers"]["entropy"] for m in (metrics, other)]
    np.testing.assert_allclose(*entropies, rtol=1e-6)


def test_v2_dropping_does_not_depend_on_accumulation():
    with jax.enable_x64(True):
        run = run_config(_small("v2", dtype="float64", param_dtype="float64"))
        state, batch = init_state(run), _batch(run)
        new, metrics = jax.jit(make_train_step(run))(state, batch)
        assert float(metrics["router"]["moe_layers"]["dropped"].min()) > 0
        other, _ = jax.jit(make_train_step(replace(run, accumulation=4)))(state, batch)
        assert_trees_close(other, new, rtol=1e-9)


def _biases(run, state, devices, steps):
    """Biases and first loads of a run from `state` on the first `devices` virtual devices."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, mesh)))
    with use_mesh(mesh):
        step = compile_train_step(run, mesh)
        first_load, biases = None, []
        for i in range(steps):
            state, metrics = step(state, place_batch(_batch(run, i), mesh))
            first_load = jax.device_get(metrics["router"]) if first_load is None else first_load
            biases.append(jax.device_get(state.router))
    return {name: stats["load"] for name, stats in first_load.items()}, biases


def _routed(**fields):
    """V3's gates and multi-token module around the plainest attention, since the test below compiles nine programs."""
    config = micro("moe", num_hidden_layers=1, num_nextn_predict_layers=1, initializer_range=0.2, **fields)
    return replace(config, ffn=replace(micro("v3").ffn, first_k_dense_replace=0))


@needs_8
@pytest.mark.parametrize("dtype", [study("float64"), "float32"])
def test_router_bias_does_not_depend_on_devices_or_accumulation(dtype):
    """20 steps on 1, 2 and 8 devices, accumulation 1 and 4, with the multi-token module's own bias."""
    with jax.enable_x64(dtype == "float64"):
        run = run_config(_routed(dtype=dtype, param_dtype=dtype), batch_size=32, bias_update_speed=0.01)
        state = jax.device_get(init_state(run))
        expected_load, expected = _biases(run, state, 1, 20)
        assert {float(np.abs(b).max()) > 0.02 for b in jax.tree.leaves(expected[-1])} == {True}
        others = ((1, 4), (2, 1), (2, 4), (8, 1), (8, 4)) if dtype == "float64" else ((2, 4), (8, 1))
        for devices, accumulation in others:
            load, biases = _biases(replace(run, accumulation=accumulation), state, devices, 20)
            assert_trees_close(load, expected_load, rtol=0)
            assert_trees_close(biases, expected, rtol=0)


def test_bias_update_by_hand():
    bias = jnp.array([[0.5, -0.5, 0.0, 0.25]])
    load = jnp.array([[10.0, 2.0, 6.0, 6.0]])
    np.testing.assert_allclose(updated_bias(bias, load, 0.1), [[0.4, -0.4, 0.0, 0.25]])
    np.testing.assert_allclose(max_violation(load), [10 / 6 - 1], rtol=1e-6)


LAYOUTS = [
    study("v3", MeshConfig(data=2, fsdp=2, tensor=2)),
    study("v2", MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ("llm-gqa", MeshConfig(data=2, fsdp=2, tensor=2)),
]


@needs_8
@pytest.mark.parametrize("kind, layout", LAYOUTS, ids=str)
def test_sharded_init_and_step_equal_one_device(kind, layout):
    run = run_config(micro(kind, num_hidden_layers=2, initializer_range=0.2))
    batch = _batch(run, segments=True)
    expected_state = init_state(run)
    expected, expected_metrics = jax.jit(make_train_step(run))(expected_state, batch)
    mesh = make_mesh(layout)
    with use_mesh(mesh):
        state = init_state(run, mesh)
        assert_trees_close(state.params, expected_state.params, rtol=0)
        sharded = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
        assert len(sharded) > 5
        new, metrics = compile_train_step(run, mesh)(state, place_batch(batch, mesh))
    assert jax.tree.structure(new.params) == jax.tree.structure(expected.params)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-5)
    assert_trees_close(new.opt_state[1][0].mu, expected.opt_state[1][0].mu, rtol=1e-4)
    assert_trees_close(metrics["router"], expected_metrics["router"], rtol=1e-5)


def test_float16_training_is_refused():
    with pytest.raises(ValueError, match=r"dtype = 'float16'.*loss scaling"):
        run_config(micro("llm", dtype="float16"))


def test_decay_leaves_norms_and_biases_out():
    run = run_config(micro("r1-distill-qwen"))
    mask = jax.tree_util.tree_leaves_with_path(decayed(init_state(run).params))
    kept = {path[-1].key for path, decays in mask if not decays}
    assert kept == {"scale", "b_q", "b_k", "b_v"}


def test_initial_weights():
    """Normal with the configuration's deviation, the same in every stack; norms 1, biases 0."""
    model = micro("v3", initializer_range=0.006)
    params = init_state(run_config(model)).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            assert (leaf == 1).all()
        elif leaf.size > 2000:
            assert float(leaf.std()) == pytest.approx(0.006, rel=0.1), jax.tree_util.keystr(path)
    first, second = params["moe_layers"]["ffn"]["experts"]["w_gate"]
    assert not np.allclose(first, second), "layers of a stack start from different weights"


def test_about_a_tenth_of_the_sequences_is_exempt():
    tokens = np.random.default_rng(0).integers(0, 1000, (20_000, 8))
    exempt = exempt_sequences(jnp.asarray(tokens), 0.1)
    assert float(exempt.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(exempt[:10_000].mean()) == pytest.approx(0.1, abs=0.015)
    np.testing.assert_array_equal(exempt_sequences(jnp.asarray(tokens[5:9]), 0.1), exempt[5:9])
    assert not exempt_sequences(jnp.asarray(tokens), 0.0).any() and exempt_sequences(jnp.asarray(tokens), 1.0).all()


@needs_8
def test_mesh_errors_carry_the_numbers():
    with pytest.raises(ValueError, match=r"tensor 3.* = 3 devices, but there are 8"):
        MeshConfig(data=1, tensor=3).resolved(8)
    with pytest.raises(ValueError, match="3 does not divide the 8 devices"):
        MeshConfig(tensor=3).resolved(8)
    run = run_config(micro("llm-gqa"))
    with pytest.raises(ValueError, match=r"w_k.*'kv_heads' of 2 is not divisible by tensor = 4"):
        init_state(run, make_mesh(MeshConfig(tensor=4)))


def test_a_checkpoint_from_before_a_field_was_there_goes_on_with_its_default():
    now = {"model": {"name": "llm", "gradient_sum": "compute"}, "seed": 0}
    require_same({"model": {"name": "llm"}, "seed": 0}, now)
    with pytest.raises(ValueError, match=r"model.gradient_sum: 'compute' in the checkpoint, 'float32' now"):
        require_same(
            {"model": {"name": "llm"}, "seed": 0}, {**now, "model": {**now["model"], "gradient_sum": "float32"}}
        )
