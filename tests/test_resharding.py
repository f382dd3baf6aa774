"""A checkpoint of one mesh on another: the same bits, and the same next loss."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import assert_trees_close, micro, random_tokens, random_variables, run_config
from marks import needs_8
from trouble import small_run

import deepseek_jax as dsj
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import LAYOUT
from deepseek_jax.infer.engine import Engine, Request, Sampling
from deepseek_jax.models.counts import abstract_variables
from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel import MeshConfig, make_mesh, tree_shardings, use_mesh
from deepseek_jax.posttrain.rollout import require_same
from deepseek_jax.posttrain.sampler import Sampler
from deepseek_jax.training import BatchRamp
from deepseek_jax.training.state import abstract_state, init_state
from deepseek_jax.training.step import compile_train_step, place_batch

pytestmark = needs_8


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


def test_moments_wait_in_the_hosts_memory(saved, tmp_path):
    """The same step, but for the compiler's choice of what to fuse; a checkpoint goes from either memory to the other."""
    folder, _, loss = saved
    mesh, there = make_mesh(MeshConfig(data=1, fsdp=8)), replace(_run(), moments_on="host")

    def moments(state: Any) -> set[str]:
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}

    with use_mesh(mesh), Store(folder, read_only=True) as store, Store(tmp_path) as other:
        state, _ = store.restore(abstract_state(there, mesh), step=store.latest_good())
        assert moments(state) == {"pinned_host"}
        new, metrics = compile_train_step(there, mesh)(state, place_batch(_batch(there, 1), mesh))
        assert moments(new) == {"pinned_host"} and float(metrics["loss"]) == loss
        other.save(2, new)
        other.wait()
        back, _ = other.restore(abstract_state(_run(), mesh), step=2)
        again, _ = store.restore(abstract_state(_run(), mesh), step=store.latest_good())
        wanted, _ = compile_train_step(_run(), mesh)(again, place_batch(_batch(there, 1), mesh))
    assert moments(back) == {"device"}
    assert_trees_close(back, wanted, rtol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), jax.device_get(new))


def test_a_policys_weights_move_to_the_layout_of_its_rollouts():
    """Trained on fsdp × expert, sampled from on expert × tensor: equal checksums, and the tokens of one device."""
    config = micro("v3", num_hidden_layers=2, dtype="float32")
    model, variables = DeepSeek(config), random_variables(config)
    requests = [Request(prompt=[p + 1, 2, 3], sampling=Sampling(max_new_tokens=6, temperature=0.0)) for p in range(8)]
    expected = [g.tokens for g in Engine(model, variables, slots=8, places=16, chunk=8).generate(requests)]
    training, generation = (
        make_mesh(MeshConfig(data=1, **degrees)) for degrees in ({"fsdp": 4, "expert": 2}, {"expert": 4, "tensor": 2})
    )
    prompter: Any = None  # of no use to weights
    with use_mesh(training):
        placed = jax.device_put(variables, tree_shardings(training, abstract_variables(config)))
        sampler = Sampler(model, prompter, max_prompt_tokens=8, max_new_tokens=8, slots=8, mesh=generation)
        sampler.load(placed)
        with use_mesh(generation):
            assert [g.tokens for g in sampler.engine.generate(requests)] == expected
        weights = sampler.engine.weights
        assert weights is not None
        other = jax.tree.map(lambda x: x, placed)
        other["params"]["final_norm"]["scale"] = placed["params"]["final_norm"]["scale"] + 1
        with pytest.raises(ValueError, match=r"1 of \d+ leaves of the sampler are not the trainer's"):
            require_same(model, other, weights, generation)


def test_another_machine_has_its_own_layout(tmp_path):
    """What a mesh needs to run the same recipe may change with it: pieces, recomputation, how experts are reached."""
    mixture = dsj.get_config("deepseek-v3-micro")
    mixture = replace(
        mixture, vocab_size=320, num_hidden_layers=1, num_nextn_predict_layers=0, dtype="float32",
        ffn=replace(mixture.ffn, first_k_dense_replace=0),
    )  # fmt: skip
    ramp = BatchRamp(start=16, tokens=500, increment=16)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(np.random.default_rng(i).choice(["alpha", "beta", "gamma"], 60)))
    config = small_run(
        corpus, tmp_path / "cache", model=mixture, steps=6, batch_size=32, accumulation=4, batch_ramp=ramp,
        checkpoint_every=3,
    )  # fmt: skip
    whole = dsj.train(config, tmp_path / "run", progress=False)
    with Store(tmp_path / "run" / "checkpoints") as store:
        store.discard(6)
    layout = dict(
        remat="full", scan_layers=False, expert_exchange="ring", expert_gather_parts=2, expert_across_slices=True,
        expert_buffer_factor=4.0,
    )  # fmt: skip
    assert layout.keys() == set(LAYOUT)
    mesh = MeshConfig(data=2, expert=4)
    other = replace(config, accumulation=2, model=replace(mixture, **layout), mesh=mesh)
    run = dsj.train(other, tmp_path / "run", progress=False)
    assert [line["step"] for line in run.metrics] == [line["step"] for line in whole.metrics]
    for line, expected in zip(run.metrics, whole.metrics, strict=True):
        assert line["tokens"] == expected["tokens"]
        np.testing.assert_allclose(line.get("loss", 0.0), expected.get("loss", 0.0), rtol=1e-5)
