"""The TPU routes compile, forward and backward, with the real TPU compiler for chips that are not there.

The compiler comes with libtpu and runs on any CPU. It is started in a child process, because its settings are read once,
from the environment. Run this file as a script, with a topology's name, to see what the child prints.
"""

import json
import sys

import pytest
from marks import needs_libtpu, study
from spread import printed_by_child

TOPOLOGIES = (study("v5p:2x2x1"), "v5e:2x2")
ENGINE = "v5e:2x2"  # where the engine's programs are compiled too; they take as long as all else


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_routes_compile_for_an_absent_tpu(topology):
    printed = printed_by_child(__file__, topology.split(":")[0], topology, timeout=600)
    rows = {row["case"]: row for row in map(json.loads, printed.splitlines())}
    engine = {"prefill", "decode"} if topology == ENGINE else set()
    assert set(rows) == {"MLA", "GQA", "MLA, long", "nano", "experts"} | engine
    # No [T, S] scores: the whole of them would take 4·B·N·T·S bytes, several of them in the backward pass.
    assert rows["MLA"]["temporary_bytes"] < rows["MLA"]["score_bytes"]
    # Forward and both gradients cost one product each; a dense expansion would cost E = 16 times as much.
    assert 1.0 <= rows["experts"]["flops"] / rows["experts"]["ideal_flops"] < 1.1
    assert rows["experts"]["kernels"] >= 3
    if engine:
        assert rows["prefill"]["kernels"] >= 3  # attention of each layer, and of the module
        # Beside weights and caches there is room for neither again.
        assert rows["decode"]["temporary_bytes"] < rows["decode"]["weight_bytes"] / 2


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

    if topology == ENGINE:
        engine_programs(sharding, report)


def engine_programs(sharding, report) -> None:
    """The engine's programs for a smaller V3: MLA 192/128, two layers and the multi-token module."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    import deepseek_jax as dsj
    from deepseek_jax.infer import programs
    from deepseek_jax.infer.sampling import Sampling, settings
    from deepseek_jax.models.cached import init_cache, unstack
    from deepseek_jax.platform import compile_for

    v3 = dsj.get_config("deepseek-v3")
    ffn = replace(
        v3.ffn, intermediate_size=2048, moe_intermediate_size=512, n_routed_experts=16, first_k_dense_replace=1
    )
    attention = replace(v3.attention, num_attention_heads=8, q_lora_rank=512)
    sizes = dict(hidden_size=1024, num_hidden_layers=2, vocab_size=8192, param_dtype="bfloat16")
    model = dsj.DeepSeek(replace(v3, ffn=ffn, attention=attention, **sizes))
    B, W, places = 8, 8192, 2048

    def on_device(function):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), jax.eval_shape(function)
        )

    weights = on_device(lambda: unstack(model, model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))))
    state = on_device(
        lambda: programs.Slots(
            cache=init_cache(model.config, B, places, mtp=True), token=jnp.zeros(B, jnp.int32),
            place=jnp.zeros(B, jnp.int32), step=jnp.zeros(B, jnp.int32), seen=jnp.zeros((B, W), bool),
            given=jax.tree.map(jnp.asarray, settings([Sampling()] * B, np.ones((B, W), bool))),
            draft=jnp.zeros(B, jnp.int32),
        )
    )  # fmt: skip
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32, sharding=sharding)
    last = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=sharding)
    resting = jax.ShapeDtypeStruct((B,), bool, sharding=sharding)
    with compile_for("tpu"):
        prefill = programs.prefill.lower(model, places, True, weights, ids, ids, None, ids, last).compile()
        decode = programs.decode.lower(model, 4, "whole", True, weights, state, resting).compile()
    report("prefill", prefill)
    report(
        "decode", decode, weight_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights, state.cache)))
    )


if __name__ == "__main__":
    main(sys.argv[1])
