"""A checkpoint of one mesh on another: the same bits, and the same next loss."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import micro, random_tokens, run_config

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.training.state import abstract_state, init_state
from deepseek_jax.training.step import compile_train_step, place_batch

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; the CPU has 8 virtual ones")


def _run():
    """V3's gates and bias around the plainest attention: quick to compile on many meshes."""
    config = micro("moe", num_hidden_layers=1, initializer_range=0.2)
    config = replace(config, ffn=replace(micro("v3").ffn, first_k_dense_replace=0))
    return run_config(config, ema_decay=0.9)


def _batch(run, seed):
    return {"tokens": random_tokens(run.model, (run.batch_size, run.seq_len + 1), seed=seed)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 1 of a run on 8 devices, and the loss of its step 2."""
    run, folder = _run(), tmp_path_factory.mktemp("saved")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with use_mesh(mesh), Store(folder) as store:
        step = compile_train_step(run, mesh)
        state, _ = step(init_state(run, mesh), place_batch(_batch(run, 0), mesh))
        store.save(1, state)
        store.wait()
        bits = jax.device_get(state)
        _, metrics = step(state, place_batch(_batch(run, 1), mesh))
    return folder, bits, float(metrics["loss"])


@pytest.mark.parametrize(
    "devices, layout", [(4, MeshConfig(data=1, fsdp=4)), (4, MeshConfig(data=1, fsdp=2, tensor=2)), (1, MeshConfig())],
)  # fmt: skip
def test_same_bits_and_same_next_loss_on_another_mesh(saved, devices, layout):
    folder, bits, loss = saved
    run, mesh = _run(), make_mesh(layout, jax.devices()[:devices])
    with use_mesh(mesh), Store(folder, read_only=True) as store:
        state, _ = store.restore(abstract_state(run, mesh), step=store.latest_good())
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), bits)
        _, metrics = compile_train_step(run, mesh)(state, place_batch(_batch(run, 1), mesh))
    assert abs(float(metrics["loss"]) - loss) <= 1e-6 * loss
