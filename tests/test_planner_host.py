"""Plans that count on the host's memory, on sums in float32, on a config's own pipeline."""

from dataclasses import replace

import pytest
from helpers import micro, run_config

import deepseek_jax as dsj
from deepseek_jax.parallel import MeshConfig
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.planner.advice import changes
from deepseek_jax.planner.ask import make_request


def test_what_lies_at_the_host():
    """Moments once a step, layers' inputs once a piece; what has no room there does not fit, and is not advised."""
    plain, moments, inputs, pieces = (
        dsj.plan("deepseek-v2-lite", "v5p:2x2x2", remat=remat, batch=8 * pieces, accumulation=pieces, moments_on=where)
        for remat, where, pieces in (
            ("full", "device", 1),
            ("full", "host", 1),
            ("offload", "device", 1),
            ("offload", "device", 8),
        )
    )
    kept = {buffer.name: buffer.bytes for buffer in plain.memory.buffers}
    of_moments = sum(size for name, size in kept.items() if name.startswith("moments"))
    of_inputs = sum(size for name, size in kept.items() if name.startswith("block_in"))
    assert plain.memory.host == 0 and moments.memory.host == of_moments and inputs.memory.host == of_inputs
    assert moments.memory.peak == plain.memory.peak - of_moments

    def moved(plan):
        return sum(one.bytes for one in plan.traffic if one.link == "host")

    assert (moved(plain), moved(moments)) == (0, 2 * of_moments)
    assert moved(inputs) == 2 * of_inputs and moved(pieces) == 8 * moved(inputs)

    full = dsj.plan("deepseek-llm-67b", "v5e:16x16", "fsdp=32,tensor=8", batch=256, remat="offload")
    assert full.headroom > 0 > full.host_headroom and not full.fits
    assert "of a device: FITS" in str(full).replace(", by arithmetic", "") and "at the host: DOES NOT FIT" in str(full)
    tight = make_request("deepseek-llm-67b", "v5e:16x16", "fsdp=32,tensor=8", batch=256, remat="full")
    assert not any(change.fits for change in changes(tight) if change.what == "--remat offload")


def test_a_plan_keeps_a_pipelines_schedule_and_knows_wider_sums():
    run = replace(run_config(micro("llm")), mesh=MeshConfig(data=1, stage=2, fsdp=-1), batch_size=8)
    run = replace(run, pipeline=Pipeline(microbatches=2, chunks=1, schedule="1f1b"))
    assert make_request(run, "v5p:2x1x1", microbatches=4).run.pipeline == replace(run.pipeline, microbatches=4)
    wider, narrow = (
        dsj.plan("deepseek-v2-lite", "v5e:4x4", fields=(f"gradient_sum={how}",)) for how in ("float32", "compute")
    )
    assert wider.times.links > narrow.times.links and wider.memory.peak >= narrow.memory.peak
    with pytest.raises(
        ValueError, match=r"ModelConfig.gradient_sum = 'float32': is not built in a pipeline: take 'compute'"
    ):
        replace(run, model=replace(run.model, gradient_sum="float32"))
