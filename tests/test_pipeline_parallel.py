"""The pipeline over `stage` gives what one device gives, moves activations from stage to stage and no stack of weights.

(test_pipeline.py is about data.)
"""

import functools
import math
from dataclasses import astuple, replace

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_trees_close, micro, random_tokens, random_variables, run_config

from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.parallel.pipeline import Pipeline
from deepseek_jax.training import RunConfig
from deepseek_jax.training.loss import loss_parts, make_totals

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; the CPU has 8 virtual ones")


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


def _gradients(run):
    """The function from variables and batch to the objective, its parts with all statistics, and every gradient."""

    def parts(variables, batch):
        totals = make_totals(batch, run.model.num_nextn_predict_layers, jnp.float32)

        def objective(params):
            return loss_parts(run, params, variables.get("router", {}), batch, totals, 0.3)

        return jax.value_and_grad(objective, has_aux=True)(variables["params"])

    return parts


@functools.cache
def _expected(kind, layers):
    run = _run(kind, layers)
    variables = random_variables(run.model)
    return variables, jax.device_get(jax.jit(_gradients(run))(variables, _batch(run)))


CASES = [
    ("whole", 3, MeshConfig(stage=2, fsdp=2, data=2), Pipeline(microbatches=2), "none"),
    ("moe", 5, MeshConfig(stage=4, tensor=2, data=1), Pipeline(microbatches=8), "full"),
    ("moe", 5, MeshConfig(stage=2, expert=2, data=1), Pipeline(microbatches=4, chunks=2), "v3"),
    ("v3", 3, MeshConfig(stage=2, fsdp=2, tensor=2, data=1), Pipeline(microbatches=4), "v3"),
    ("v2", 2, MeshConfig(stage=2, data=2), Pipeline(microbatches=2), "none"),
    ("llm-gqa", 3, MeshConfig(stage=2, tensor=2, data=1), Pipeline(microbatches=4), "none"),
]


@pytest.mark.parametrize("kind, layers, mesh, pipeline, remat", CASES, ids=str)
def test_losses_statistics_and_gradients_equal_one_device(kind, layers, mesh, pipeline, remat):
    variables, expected = _expected(kind, layers)
    run = _run(kind, layers, mesh, pipeline, remat=remat)
    with use_mesh(make_mesh(mesh, jax.devices()[: math.prod(astuple(mesh))])):
        actual = jax.jit(_gradients(run))(variables, _batch(run))
    assert_trees_close(actual, expected, rtol=1e-5)
    (_, losses), _ = expected
    if losses.router:
        assert losses.router["moe_layers"].load.shape[0] == layers and float(losses.balance) > 0
        assert kind != "v2" or float(losses.router["moe_layers"].dropped.min()) > 0
