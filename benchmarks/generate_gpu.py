"""Greedy generation on one GPU, 512 tokens in and 256 out, beside transformers' `generate` in the same call.

Two models with random bfloat16 weights: the 2.35 B V3-style mixture of experts of benchmarks/train_step_gpu.py, and LLM 7B.

    python benchmarks/generate_gpu.py [--models moe llm] [--batches 1 32] [--rounds 3] [--peer]

Each side runs in a process of its own; a figure is new tokens over the whole time, prefill included, the median of the
rounds. transformers runs its static cache (compiled) and its dynamic one at batch 1, the dynamic one at batch 32.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time

PROMPT, NEW = 512, 256


def ours(options: argparse.Namespace) -> dict:
    """Tokens/s of each round."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from train_step_gpu import model as moe

    import deepseek_jax as dsj
    from deepseek_jax.infer.engine import Engine, Request
    from deepseek_jax.infer.sampling import Sampling

    config = moe("none") if options.model == "moe" else dsj.get_config("deepseek-llm-7b")
    config = dataclasses.replace(config, param_dtype="bfloat16", dtype="bfloat16")
    model = dsj.DeepSeek(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))

    @jax.jit
    def draw():
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        return tree.unflatten(
            [(0.02 * jax.random.normal(k, x.shape)).astype(x.dtype) for k, x in zip(keys, leaves, strict=True)]
        )

    variables = draw()
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (options.batch, PROMPT)).tolist()
    engine = Engine(
        model, variables, slots=options.batch, places=PROMPT + NEW, chunk=512, decode_steps=32, consume=True
    )
    requests = [Request(prompt=prompt, sampling=Sampling(max_new_tokens=NEW)) for prompt in prompts]
    start = time.perf_counter()
    engine.generate(requests)
    first = time.perf_counter() - start
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        results = engine.generate(requests)
        times.append(time.perf_counter() - start)
    assert all(len(result.tokens) == NEW for result in results)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return {"speeds": [options.batch * NEW / t for t in times], "first_s": first, "GiB": peak}


def theirs(options: argparse.Namespace) -> dict:
    """transformers: tokens/s of each round."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

    none = dict(tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if options.model == "moe":
        config = DeepseekV3Config(
            vocab_size=102400, hidden_size=2048, intermediate_size=8192, moe_intermediate_size=1408,
            num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
            n_routed_experts=16, num_experts_per_tok=6, n_group=1, topk_group=1, first_k_dense_replace=1,
            kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            routed_scaling_factor=1.0, norm_topk_prob=True, max_position_embeddings=8192, num_nextn_predict_layers=0,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0), **none,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-6, **none,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    g = model.generation_config
    g.eos_token_id, g.pad_token_id, g.bos_token_id = None, 0, None
    tokens = torch.randint(0, config.vocab_size, (options.batch, PROMPT), device="cuda")
    arguments = dict(do_sample=False, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW)
    if options.cache == "static":
        arguments["cache_implementation"] = "static"

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(tokens, **arguments)
        torch.cuda.synchronize()
        assert out.shape[1] == PROMPT + NEW
        return time.perf_counter() - start

    first = run()
    if options.cache == "static":
        run()
    times = [run() for _ in range(options.rounds)]
    return {
        "speeds": [options.batch * NEW / t for t in times], "first_s": first,
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip


def child(side: str, **fields) -> dict | str:
    words = [sys.executable, __file__, "--side", side]
    for name, value in fields.items():
        words += [f"--{name}", str(value)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["moe", "llm"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="run transformers too")
    for name in ("side", "model", "cache"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps((ours if options.side == "ours" else theirs)(options)))
        return
    for model in options.models:
        for batch in options.batches:
            sides = [("ours", "latent or keys and values")]
            if options.peer:
                sides += [("theirs", cache) for cache in (("static", "dynamic") if batch == 1 else ("dynamic",))]
            for side, cache in sides:
                got = child(side, model=model, batch=batch, cache=cache, rounds=options.rounds)
                if isinstance(got, str):
                    print(f"{model} batch {batch} {side} {cache}: failed: {got}", flush=True)
                    continue
                speeds = got["speeds"]
                print(
                    f"{model} batch {batch:2d} {side:6s} {cache:26s} {statistics.median(speeds):8.0f} tok/s "
                    f"({min(speeds):.0f} to {max(speeds):.0f})  first call {got['first_s']:.0f} s  peak {got['GiB']:.1f} GiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
