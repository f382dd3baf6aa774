"""The TPU routes compile, forward and backward, with the real TPU compiler for chips that are not there.

The compiler comes with libtpu and runs on any CPU. It is started in a child process, because its settings are read once,
from the environment. Run this file as a script, with a topology's name, to see what the child prints.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOPOLOGIES = {"v5p:2x2x1": "v5p-8", "v5e:2x2": "v5litepod-4"}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_routes_compile_for_an_absent_tpu(topology):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=TOPOLOGIES[topology],
        TPU_WORKER_HOSTNAMES="localhost",
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    )
    child = subprocess.run(
        [sys.executable, __file__, topology], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr[-4000:]
    rows = {row["case"]: row for row in map(json.loads, child.stdout.splitlines())}
    assert set(rows) == {"MLA", "GQA", "MLA, long", "nano", "experts"}
    # No [T, S] scores: the whole of them would take 4·B·N·T·S bytes, several of them in the backward pass.
    assert rows["MLA"]["temporary_bytes"] < rows["MLA"]["score_bytes"]
    # Forward and both gradients cost one product each; a dense expansion would cost E = 16 times as much.
    assert 1.0 <= rows["experts"]["flops"] / rows["experts"]["ideal_flops"] < 1.1
    assert rows["experts"]["kernels"] >= 3


def main(topology: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from deepseek_jax.kernels.attention import attention
    from deepseek_jax.kernels.grouped_matmul import grouped_matmul
    from deepseek_jax.platform import compile_for

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)

    def compiled(function, *shapes):
        """`function` and its gradients for arrays of these shapes, the last one that of the output."""

        def run(*args):
            out, pull = jax.vjp(function, *args[:-1])
            return out, pull(args[-1])

        args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
        with compile_for("tpu"):
            return jax.jit(run).lower(*args).compile()

    def report(case: str, program, **more) -> None:
        memory, cost = program.memory_analysis(), program.cost_analysis()
        row = dict(case=case, temporary_bytes=memory.temp_size_in_bytes, flops=cost["flops"], **more)
        print(
            json.dumps({**row, "kernels": program.as_text().count('custom_call_target="tpu_custom_call"')}), flush=True
        )

    def attend(case: str, B: int, T: int, N: int, K: int, H: int, V: int) -> None:
        # Ids that depend on nothing are enough to compile the segmented kernels.
        def run(q, k, v):
            ids = (jnp.arange(B * T).reshape(B, T) // 100) % 3
            segments = dict(q_segment_ids=ids, kv_segment_ids=ids)
            return attention(q, k, v, scale=H**-0.5, implementation="splash", **segments)

        program = compiled(run, (B, T, N, H), (B, T, K, H), (B, T, K, V), (B, T, N, V))
        report(case, program, score_bytes=4 * B * N * T * T)

    attend("MLA", 1, 2048, 8, 8, 192, 128)
    attend("GQA", 1, 2048, 8, 2, 128, 128)
    # Five key blocks: past what the fused backward takes, so the separate kernels.
    attend("MLA, long", 1, 5120, 2, 2, 192, 128)
    attend("nano", 2, 256, 4, 4, 48, 32)

    M, K, N, E = 8192, 2048, 1408, 16

    def experts(x, w):
        return grouped_matmul(x, w, jnp.full(E, M // E, jnp.int32), implementation="ragged_dot")

    report("experts", compiled(experts, (M, K), (E, K, N), (M, N)), ideal_flops=3 * 2 * M * K * N)


if __name__ == "__main__":
    main(sys.argv[1])
