"""The pipeline over `stage` gives what one device gives, moves activations from stage to stage and no stack of weights.

(test_pipeline.py is about data.)
"""

import functools
import math
import re
from dataclasses import astuple, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_close, loss_and_gradients, micro, random_tokens, random_variables, run_config
from marks import needs_8, needs_libtpu, study

from deepseek_jax.models.transformer import DeepSeek
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.pipeline import Pipeline, cut, joined
from deepseek_jax.planner.compiled import compile_plan
from deepseek_jax.planner.hlo import collectives_in
from deepseek_jax.planner.request import PlanRequest
from deepseek_jax.planner.topology import parse_topology
from deepseek_jax.training import RunConfig
from deepseek_jax.training.begin import check_pieces
from deepseek_jax.training.state import abstract_state, init_state
from deepseek_jax.training.step import compile_train_step, make_train_step, place_batch

pytestmark = needs_8


def _model(kind, layers):
    """`layers` layers in the pipeline's stack, and nothing else; but "whole" has V3's dense layer and multi-token module
    too, around plain attention."""
    if kind == "whole":
        config = micro("moe", num_hidden_layers=layers + 1, num_nextn_predict_layers=1)
        return replace(config, ffn=micro("v3").ffn)
    config = micro(kind, num_hidden_layers=layers, num_nextn_predict_layers=0)
    return config if kind == "llm-gqa" else replace(config, ffn=replace(config.ffn, first_k_dense_replace=0))


def _run(kind, layers, mesh=None, pipeline=None, **fields) -> RunConfig:
    model = replace(_model(kind, layers), **fields)
    return run_config(model, batch_size=8, seq_len=12, mesh=mesh or MeshConfig(), pipeline=pipeline)


def _batch(run):
    """Rows of different lengths, of several documents each: what a microbatch counts differs."""
    tokens = random_tokens(run.model, (run.batch_size, run.seq_len + 1))
    places, rows = jnp.arange(run.seq_len + 1), jnp.arange(run.batch_size)[:, None]
    return {"tokens": tokens, "segment_ids": jnp.where(places < 6 + rows, places // 5 + 1, 0).astype(jnp.int32)}


@functools.cache
def _expected(kind, layers):
    run = _run(kind, layers)
    variables = random_variables(run.model)
    return variables, jax.device_get(jax.jit(functools.partial(loss_and_gradients, run))(variables, _batch(run)))


CASES = [
    ("llm-gqa", 5, MeshConfig(stage=4, tensor=2, data=1), Pipeline(microbatches=8), "full"),
    ("moe", 5, MeshConfig(stage=2, expert=2, data=1), Pipeline(microbatches=4, chunks=2), "v3"),
    ("v2", 2, MeshConfig(stage=2, data=2), Pipeline(microbatches=2), "none"),
    ("llm-gqa", 5, MeshConfig(stage=4, tensor=2, data=1), Pipeline(microbatches=8, schedule="1f1b"), "none"),
    ("moe", 5, MeshConfig(stage=2, expert=2, data=1), Pipeline(microbatches=4, chunks=2, schedule="1f1b"), "v3"),
    ("whole", 3, MeshConfig(stage=2, data=1), Pipeline(microbatches=8, schedule="1f1b"), "full"),
]


@pytest.mark.parametrize(
    "kind, layers, mesh, pipeline, remat", CASES, ids=[f"{case[0]}-{case[3].schedule}" for case in CASES]
)
def test_losses_statistics_and_gradients_equal_one_device(kind, layers, mesh, pipeline, remat):
    variables, expected = _expected(kind, layers)
    run = _run(kind, layers, mesh, pipeline, remat=remat)
    with use_mesh(make_mesh(mesh, jax.devices()[: math.prod(astuple(mesh))])):
        actual = jax.jit(functools.partial(loss_and_gradients, run))(variables, _batch(run))
    assert_trees_close(actual, expected, rtol=1e-5)
    (_, losses), _ = expected
    if losses.router:
        assert losses.router["moe_layers"].load.shape[0] == layers and float(losses.balance) > 0
        assert kind != "v2" or float(losses.router["moe_layers"].dropped.min()) > 0


@pytest.mark.parametrize("schedule", [study("gpipe"), "1f1b"])
def test_a_whole_step_equals_one_device(schedule):
    """V3's parts in two accumulated pieces; the program hands over activations, and gathers one layer's weights at a time."""
    layers, mesh = 3, MeshConfig(stage=2, fsdp=2, data=2)
    run = replace(_run("whole", layers), batch_size=16, accumulation=2, bias_update_speed=0.01)
    batch = _batch(run)
    state = init_state(run)
    state = replace(state, params=random_variables(run.model)["params"])
    expected, expected_metrics = jax.jit(make_train_step(run))(state, batch)
    run = replace(run, mesh=mesh, pipeline=Pipeline(microbatches=2, schedule=schedule))
    devices = make_mesh(mesh)
    with use_mesh(devices):
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run, devices)))
        batch = place_batch(batch, devices)
        program = compile_train_step(run, devices).lower(state, batch).compile()
        actual, metrics = program(state, batch)
    assert (
        float(expected_metrics["loss_mtp"].min()) > 0
        and np.abs(expected.router["mtp"]["block"]["ffn"]["router"]["bias"]).max() > 0
    )
    assert_trees_close(metrics, expected_metrics, rtol=1e-5)
    assert_trees_close(actual.router, expected.router, rtol=0)
    assert_trees_close(actual.opt_state[1][0].mu, expected.opt_state[1][0].mu, rtol=1e-5)

    moved = collectives_in(program.as_text())
    rows, D = 8 // 2 // 4, run.model.hidden_size
    state_shape = f"f32[{rows},{run.seq_len},{D}]"
    assert [one for one in moved if one.kind.startswith("collective-permute") and one.shape == state_shape]
    # Attention's and the experts' matrices, whose dims are like those of nothing else.
    matrices = {tuple(sorted(leaf.shape[1:])) for leaf in jax.tree.leaves(state.params["moe_layers"]) if leaf.ndim > 3}
    assert len(matrices) > 1
    for one in (one for one in moved if one.kind.startswith("all-gather")):
        dims = [int(dim) for dim in re.findall(r"\d+", one.shape.partition("[")[2]) if dim != "1"]
        for several in (2, layers, 4):  # layers of a stage, of the model, of all stages with the empty one
            rest = sorted(dims)
            if several in rest:
                rest.remove(several)
                assert tuple(rest) not in matrices, one


def _done_by_hand(S, V, M):
    """Microbatch and chunk by stage and tick, worked off greedily: a chunk begins when the one before it is done."""
    ready = {(m, 0): 0 for m in range(M)}  # (microbatch, chunk of the model) -> tick from which it can begin
    plan, t = [], 0
    while ready:
        row = []
        for s in range(S):
            # Of what waits here: groups of S microbatches in turn, then the earlier chunk.
            here = [(m // S, c, m) for (m, c), begin in ready.items() if c % S == s and begin <= t]
            row.append(None)
            if here:
                _, c, m = min(here)
                row[s] = (m, c)
        for m, c in filter(None, row):
            del ready[m, c]
            if c + 1 < S * V:
                ready[m, c + 1] = t + 1
        plan.append(row)
        t += 1
    return plan


@pytest.mark.parametrize("S, V, M", [(2, 1, 4), (4, 1, 8), (4, 1, 4), (2, 3, 4), (4, 2, 8)])
def test_the_schedule_is_the_one_without_needless_waiting(S, V, M):
    plan = _done_by_hand(S, V, M)
    assert len(plan) == M * V + S - 1
    for t, row in enumerate(plan):
        for s, done in enumerate(row):
            u = t - s
            v, m = u % (S * V) // S, u // (S * V) * S + u % S  # as parallel/pipeline.py says
            assert done == ((m, v * S + s) if 0 <= u < M * V else None)
    idle = sum(row.count(None) for row in plan) / (S * len(plan))
    assert Pipeline(microbatches=M, chunks=V).idle(S) == pytest.approx(idle)


def test_rows_are_cut_and_joined_in_place():
    mesh = MeshConfig(slice=2, stage=2, fsdp=2, data=1)
    x = jnp.arange(16 * 3).reshape(16, 3)
    with use_mesh(make_mesh(mesh)):
        parts = jax.jit(lambda x: cut(x, 4))(x)
        np.testing.assert_array_equal(jax.jit(joined)(parts), x)
    assert parts.shape == (2, 2, 4, 3)
    # Rows 4 to 7 lie on stage 1 of slice 0: that stage's microbatches have them all, and those of slice 1.
    assert set(np.asarray(parts[1, :, :, 0]).ravel() // 3) == {*range(4, 8), *range(12, 16)}


def test_what_does_not_fit_is_refused_with_numbers():
    mesh = MeshConfig(stage=2, data=4)

    def check(**fields):
        check_pieces(_run("moe", 4, mesh, Pipeline(**fields)), make_mesh(mesh))

    check(microbatches=2)
    with pytest.raises(
        ValueError, match=r"microbatches = 3: must be a multiple of MeshConfig.stage = 2, such as 4.*wait 20%"
    ):
        check(microbatches=3)
    with pytest.raises(ValueError, match=r"microbatches = 4: a piece of 8 sequences.* multiple of 16"):
        check(microbatches=4)
    with pytest.raises(
        ValueError, match=r"chunks = 3 on MeshConfig.stage = 2 is 6 chunks for the 4 layers.*or 2 chunks"
    ):
        check(microbatches=2, chunks=3)
    with pytest.raises(ValueError, match=r"chunks = 0: must be at least 1"):
        Pipeline(microbatches=2, chunks=0)
    with pytest.raises(ValueError, match=r"Pipeline.schedule = 'zb1p': must be one of \('gpipe', '1f1b'\)"):
        Pipeline(microbatches=2, schedule="zb1p")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"RunConfig.pipeline = .*needs stages, and MeshConfig.stage = 1"):
        _run("moe", 4, MeshConfig(), Pipeline(microbatches=2))
    model = _model("moe", 2)
    variables, tokens = random_variables(model), jnp.zeros((8, 12), jnp.int32)
    experts = jnp.zeros((8, 12, 2, 2), jnp.int32)
    model, pipeline = DeepSeek(model), Pipeline(microbatches=2)
    with use_mesh(make_mesh(mesh)), pytest.raises(ValueError, match="recorded experts"):
        jax.eval_shape(lambda: model.apply(variables, tokens, experts=experts, pipeline=pipeline, method="hidden"))


@pytest.mark.aot
@needs_libtpu
def test_a_step_compiles_for_an_absent_tpu():
    """Weights go to their stages in bfloat16, before any gradient does in float32."""
    model = replace(_model("v3", 3), dtype="bfloat16", remat="full")
    run = run_config(
        model, batch_size=8, seq_len=128, mesh=MeshConfig(stage=2, fsdp=2, data=1), pipeline=Pipeline(microbatches=4)
    )  # fmt: skip
    compiled = compile_plan(PlanRequest(run=run, topology=parse_topology("v5p:2x2x1")), timeout=900)
    assert compiled.fits
    regrouped = [
        one for one in compiled.collectives if "_pipelined/jit(_pad)" in one.where and "all-to-all" in one.kind
    ]
    there = [one for one in regrouped if "transpose" not in one.where]
    back = [one for one in regrouped if "transpose" in one.where]
    wide = [one.bytes for one in there if not one.shape.startswith("bf16")]
    # Two layers for each of two stages, of which a device stores a quarter.
    assert len(there) > 8 and wide == [4 * 2 * 2 * model.hidden_size * 8 // 4], "the router alone is read in float32"
    assert len(back) > 8 and {one.shape.partition("[")[0] for one in back} == {"f32"}
    ticks = 4 + 2 - 1
    assert [one for one in compiled.collectives if one.kind.startswith("collective-permute") and one.times == ticks]
