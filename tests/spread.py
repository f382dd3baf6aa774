"""What several test files do with many devices: experts beside one device, and programs for TPUs that are not there."""

import subprocess
import sys
from typing import Any

import jax
import numpy as np

from deepseek_jax.layers.expert_parallel import Exchange, parallel_experts
from deepseek_jax.layers.experts import routed_experts
from deepseek_jax.parallel import MeshConfig, make_mesh, use_mesh
from deepseek_jax.planner.compiled import environment


def assert_experts_equal_one_device(
    x: jax.Array, indices: jax.Array, rest: Any, cotangent: jax.Array, exchange: Exchange, layout: dict[str, int],
    valid: jax.Array | None = None,
) -> None:  # fmt: skip
    """Value and gradients of routed experts (`rest`: gate weights and the three matrices) on a layout of 8 devices."""
    M = x.shape[0] * x.shape[1]

    def alone(x, weights, *matrices):
        flat = (a.reshape(M, -1) for a in (x, indices, weights))
        return (routed_experts(*flat, *matrices).reshape(x.shape) * cotangent).sum()

    def spread(x, weights, *matrices):
        out, left = parallel_experts(x, indices, weights, *matrices, exchange=exchange, decoding=False, valid_BT=valid)
        return (out * cotangent).sum(), left

    wanted = jax.value_and_grad(alone, range(5))(x, *rest)
    with use_mesh(make_mesh(MeshConfig(data=1, **layout), jax.devices()[:8])):
        (total, left), grads = jax.jit(jax.value_and_grad(spread, range(5), has_aux=True))(x, *rest)
    assert left == 0
    for ours, theirs in zip(jax.tree.leaves((total, grads)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def printed_by_child(script: str, device: str, *arguments: str, timeout: float = 900) -> str:
    """What a test file prints, run as a program that compiles for an absent TPU: libtpu reads its settings once."""
    child = subprocess.run(
        [sys.executable, script, *arguments], env=environment(device), capture_output=True, text=True, timeout=timeout
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout
