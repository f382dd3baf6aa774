"""Training step of a 2.35 B V3-style mixture of experts on one GPU, or on several of a host: tokens/s, MFU, peak memory.

The shape is that of the torch + transformers comparator in docs/benchmarks.md: 12 layers, the first dense, MLA 192/128
with 16 heads, 16 experts of 1408, 6 a token, 2 shared, vocabulary 102,400, 4,096 tokens a sequence; parameters,
gradients and moments in bfloat16 there, so here too.

    python benchmarks/train_step_gpu.py --batch 4 --remat none v3
    python benchmarks/train_step_gpu.py --batch 4 --mesh expert=2 --exchange ragged ring [--buffer 1.25]

With `--mesh` the batch is that of a device, and dense weights are sharded over all axes of the mesh.
"""

import argparse
import itertools
import math
import statistics
import time
from dataclasses import replace

import jax
import jax.numpy as jnp

from deepseek_jax.config import MLA, ModelConfig, MoE, Rope
from deepseek_jax.data.config import DataConfig
from deepseek_jax.metrics.flops import mfu, peak_flops, train_flops_per_token
from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
from deepseek_jax.training import AdamW, MultiStep, RunConfig
from deepseek_jax.training.state import init_state
from deepseek_jax.training.step import compile_train_step, place_batch


def model(remat: str, exchange: str, buffer: float | None) -> ModelConfig:
    return ModelConfig(
        name="v3-style-2b", vocab_size=102400, hidden_size=2048, num_hidden_layers=12, remat=remat,
        expert_exchange=exchange, expert_buffer_factor=buffer,
        attention=MLA(
            num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        ),
        ffn=MoE(
            intermediate_size=8192, moe_intermediate_size=1408, n_routed_experts=16, n_shared_experts=2,
            num_experts_per_tok=6, first_k_dense_replace=1, scoring_func="sigmoid", topk_method="noaux_tc",
            norm_topk_prob=True,
        ),
        rope=Rope(interleaved=True), max_position_embeddings=8192, param_dtype="bfloat16",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a device")
    parser.add_argument("--mesh", default="data=1", help="such as fsdp=2,expert=2")
    parser.add_argument("--exchange", nargs="+", default=["ragged"], help="of tokens between experts: ragged, ring")
    parser.add_argument("--buffer", type=float, help="places for what comes to an expert's device, over its even share")
    parser.add_argument("--moments-on", choices=("device", "host"), default="device")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--remat", nargs="+", default=["none"])
    options = parser.parse_args()
    degrees = {name: int(degree) for name, _, degree in (part.partition("=") for part in options.mesh.split(","))}
    devices = math.prod(degrees.values())
    batch = options.batch * devices
    for remat, exchange in itertools.product(options.remat, options.exchange):
        config = model(remat, exchange, options.buffer)
        run = RunConfig(
            optimizer=AdamW(moment_dtype="bfloat16"),
            model=config, schedule=MultiStep(peak=1e-4), steps=1000, batch_size=batch, seq_len=options.length,
            data=DataConfig(tokenizer="unused"), moments_on=options.moments_on,
        )  # fmt: skip
        mesh = make_mesh(MeshConfig(**({"data": 1} | degrees)), jax.devices()[:devices])
        with use_mesh(mesh):
            try:
                state, step = init_state(run, mesh), compile_train_step(run, mesh)
                tokens = jax.random.randint(
                    jax.random.key(1), (8, batch, options.length + 1), 0, config.vocab_size, jnp.int32
                )
                batches = [place_batch({"tokens": x}, mesh) for x in tokens]
                start = time.perf_counter()
                state, metrics = step(state, batches[0])
                first = float(metrics["loss"])
                compile_seconds = time.perf_counter() - start
                times = []
                for i in range(options.steps + 2):
                    start = time.perf_counter()
                    state, metrics = step(state, batches[i % 8])
                    jax.block_until_ready(metrics)
                    times.append(time.perf_counter() - start)
                times = times[2:]
            except jax.errors.JaxRuntimeError as error:
                print(f"{options.mesh} {exchange} remat {remat:5s} batch {batch}: {str(error)[:300]}", flush=True)
                continue
        seconds, count = statistics.median(times), batch * options.length
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        rate = peak_flops(jax.devices()[0].device_kind, config.dtype)
        share = mfu(count / seconds, train_flops_per_token(config, options.length), devices, rate) or float("nan")
        where = f"{options.mesh} {exchange} remat {remat:5s} moments on {options.moments_on} batch {batch}"
        print(
            f"{where}: {count / seconds:8.0f} tok/s  {seconds * 1e3:6.1f} ms "
            f"(min {min(times) * 1e3:.1f} max {max(times) * 1e3:.1f})  MFU {100 * share:.1f} %  peak {peak:.1f} GiB  "
            f"first step {compile_seconds:.0f} s  loss {first:.2f} -> {float(metrics['loss']):.2f}  "
            f"{replace(config, remat='none').name} on {jax.devices()[0].device_kind}, jax {jax.__version__}",
            flush=True,
        )
        del state, metrics, batches


if __name__ == "__main__":
    main()
