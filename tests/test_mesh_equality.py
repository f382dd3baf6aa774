"""The same numbers on any mesh: losses, gradients, loads, balance losses and the moved bias equal one device's."""

from typing import Any

import jax
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
from marks import needs_8

from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.training.bias import update_router
from deepseek_jax.training.step import place_batch

pytestmark = needs_8

# Every layout of the study (experiments/mesh_equality): name -> degrees (what is left over is data's), fields of the model.
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "data": ({}, {}),
    "slice": ({"slice": 2}, {}),
    "fsdp": ({"fsdp": 8}, {}),
    "expert": ({"expert": 8}, {}),
    "expert, ring": ({"expert": 4}, {"expert_exchange": "ring"}),
    "tensor": ({"data": 4, "tensor": 2}, {}),
    "context": ({"data": 4, "context": 2}, {}),
    "stage": ({"data": 4, "stage": 2}, {}),
    "fsdp × expert": ({"fsdp": 2, "expert": 4}, {}),
    "fsdp × expert × tensor": ({"fsdp": 2, "expert": 2, "tensor": 2}, {}),
    "expert × context × tensor": ({"expert": 2, "context": 2, "tensor": 2}, {}),
    "expert × context": ({"expert": 2, "context": 2, "fsdp": 2}, {}),
    "slice × fsdp × expert, ring": ({"slice": 2, "fsdp": 2, "expert": 2}, {"expert_exchange": "ring"}),
    "slices of experts": ({"slice": 2, "fsdp": 2, "expert": 2}, {"expert_across_slices": True}),
    "slices of experts, ring": ({"slice": 4, "expert": 2}, {"expert_across_slices": True, "expert_exchange": "ring"}),
}

CORE = ("fsdp × expert × tensor", "expert × context", "slice × fsdp × expert, ring", "slices of experts")
"""What is compiled here: both exchanges and every axis but `stage`, which test_pipeline_parallel.py has. The study has all."""


def run_of(**fields: Any) -> Any:
    return run_config(micro("v3", dtype="float32", **fields))


def batch_of(run: Any) -> dict[str, jax.Array]:
    """Two documents a row, and padding."""
    tokens = random_tokens(run.model, (run.batch_size, run.seq_len + 1))
    ids = np.ones(tokens.shape, np.int32)
    ids[:, 7:] = 2
    ids[::3, -3:] = 0
    return {"tokens": tokens, "segment_ids": jax.numpy.asarray(ids)}


def numbers(run: Any, layout: MeshConfig, devices: int) -> dict[str, Any]:
    """What a step works out on a mesh: losses, gradients, statistics, bias."""
    mesh = make_mesh(layout, jax.devices()[:devices])
    variables = random_variables(run.model)
    with use_mesh(mesh):
        variables = variables_on(mesh, run, variables)
        shardings = jax.tree.map(lambda x: x.sharding, variables)
        batch = place_batch(batch_of(run), mesh)

        def compute(variables: Any, batch: Any) -> Any:
            (total, losses), grads = loss_and_gradients(run, variables, batch)
            return total, losses, grads, update_router(variables.get("router", {}), losses.router, 0.001)

        out = (None, None, shardings["params"], shardings.get("router", {}))
        total, losses, grads, router = jax.jit(compute, out_shardings=out)(variables, batch)
    return jax.device_get(
        {"total": total, "main": losses.main, "mtp": losses.mtp, "balance": losses.balance, "grads": grads,
         "stats": losses.router, "router": router}
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    return numbers(run_of(), MeshConfig(), 1)


@pytest.mark.parametrize("name", CORE)
def test_every_layout_gives_the_numbers_of_one_device(alone, name):
    degrees, fields = LAYOUTS[name]
    ours = numbers(run_of(**fields), MeshConfig(**({"data": -1} | degrees)), 8)
    assert_trees_close(ours, alone, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(ours["router"]["moe_layers"]["ffn"]["router"]["bias"],
                                  alone["router"]["moe_layers"]["ffn"]["router"]["bias"])  # fmt: skip
