"""Greedy generation beside transformers' `generate` in the same call: on one GPU, or on a CPU.

On a GPU two models with random bfloat16 weights, 512 tokens in and 256 out: the 2.35 B V3-style mixture of experts of
benchmarks/train_step_gpu.py, and LLM 7B. On a CPU deepseek-v3-nano and deepseek-llm-nano in float32, 64 in and 64 out.

    python benchmarks/generate.py [--models moe llm] [--batches 1 32] [--rounds 3] [--peer]
    JAX_PLATFORMS=cpu python benchmarks/generate.py --models v3-nano llm-nano --batches 1 16 --peer

Each side runs in a process of its own, in turns where they fit the machine together (CPU); a figure is new tokens over the
whole time, prefill included, the median of the rounds. transformers runs its static cache (compiled on a GPU) and its
dynamic one.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {"gpu": (512, 256), "cpu": (64, 64)}  # tokens of a prompt, new ones


def on_cpu(name: str) -> bool:
    return name.endswith("nano")


def prompts(vocabulary: int, batch: int, length: int) -> list[list[int]]:
    import numpy as np

    return np.random.default_rng(0).integers(3, vocabulary, (batch, length)).tolist()


def ours(options: argparse.Namespace) -> dict:
    """Tokens/s of each round."""
    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj
    from deepseek_jax.infer.engine import Engine, Request
    from deepseek_jax.infer.sampling import Sampling

    length, new = SIZES["cpu" if on_cpu(options.model) else "gpu"]
    if on_cpu(options.model):
        model, variables = dsj.load_hf(options.folder, progress=False)
    else:
        from train_step_gpu import model as moe

        config = moe("none") if options.model == "moe" else dsj.get_config("deepseek-llm-7b")
        model = dsj.DeepSeek(dataclasses.replace(config, param_dtype="bfloat16", dtype="bfloat16"))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        leaves, tree = jax.tree.flatten(shapes)
        draw = jax.jit(lambda key, x: (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype), static_argnums=1)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        variables = tree.unflatten([draw(k, x) for k, x in zip(keys, leaves, strict=True)])
    engine = Engine(
        model,
        variables,
        slots=options.batch,
        places=length + new,
        chunk=512,
        decode_steps=min(32, new),
        consume=True,
        prefill_rows=min(options.batch, 8),
    )
    requests = [
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=new))
        for prompt in prompts(model.config.vocab_size, options.batch, length)
    ]
    start = time.perf_counter()
    engine.generate(requests)
    first = time.perf_counter() - start
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        results = engine.generate(requests)
        times.append(time.perf_counter() - start)
    assert all(len(result.tokens) == new for result in results)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return {
        "speeds": [options.batch * new / t for t in times], "first_s": first, "GiB": peak,
        "tokens": [result.tokens for result in results] if on_cpu(options.model) else None,
    }  # fmt: skip


def theirs(options: argparse.Namespace) -> dict:
    """transformers: tokens/s of each round."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

    length, new = SIZES["cpu" if on_cpu(options.model) else "gpu"]
    device = "cpu" if on_cpu(options.model) else "cuda"
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
    elif options.model == "llm":
        config = LlamaConfig(
            vocab_size=102400, hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32,
            num_key_value_heads=32, max_position_embeddings=4096, rms_norm_eps=1e-6, **none,
        )  # fmt: skip
    torch.manual_seed(0)
    if on_cpu(options.model):
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="sdpa")
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.eval()
    g = model.generation_config
    g.eos_token_id, g.pad_token_id, g.bos_token_id = None, 0, None
    tokens = torch.tensor(prompts(model.config.vocab_size, options.batch, length), device=device)
    arguments = dict(do_sample=False, attention_mask=torch.ones_like(tokens), max_new_tokens=new)
    if options.cache == "static":
        arguments["cache_implementation"] = "static"

    def run() -> tuple[float, list]:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(tokens, **arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        assert out.shape[1] == length + new
        return time.perf_counter() - start, out[:, length:].tolist()

    first, _ = run()
    if options.cache == "static":
        run()
    runs = [run() for _ in range(options.rounds)]
    return {
        "speeds": [options.batch * new / t for t, _ in runs], "first_s": first,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0,
        "tokens": runs[-1][1] if on_cpu(options.model) else None,
    }  # fmt: skip


def write(options: argparse.Namespace) -> dict:
    """A published checkpoint with the weights of both sides."""
    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj

    model = dsj.DeepSeek(
        dataclasses.replace(
            dsj.get_config(f"deepseek-{options.model}"), num_nextn_predict_layers=0, initializer_range=0.05
        )
    )
    dsj.save_hf(options.folder, model, model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32)), "float32")
    return {}


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
    parser.add_argument("--caches", nargs="+", default=["static", "dynamic"], help="of transformers")
    for name in ("side", "model", "cache", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps({"ours": ours, "theirs": theirs, "write": write}[options.side](options)))
        return
    for model in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = f"{scratch}/checkpoint"
            if on_cpu(model) and (said := child("write", model=model, folder=folder)):
                sys.exit(f"{model}: {said}")
            for batch in options.batches:
                compare(options, model, batch, folder)


def compare(options: argparse.Namespace, model: str, batch: int, folder: str) -> None:
    """One model at one batch size: a line a side, and the ratio to the peer's best."""
    sides = [("ours", "own"), *(("theirs", cache) for cache in options.caches if options.peer)]
    tokens, best = {}, {}
    for side, cache in sides:
        got = child(side, model=model, batch=batch, cache=cache, rounds=options.rounds, folder=folder)
        if isinstance(got, str):
            print(f"{model} batch {batch} {side} {cache}: failed: {got}", flush=True)
            continue
        speeds = got["speeds"]
        tokens[side], best[side] = got["tokens"], max(best.get(side, 0), statistics.median(speeds))
        print(
            f"{model} batch {batch:2d} {side:6s} {cache:8s} {statistics.median(speeds):8.0f} tok/s "
            f"({min(speeds):.0f} to {max(speeds):.0f})  first call {got['first_s']:.0f} s  peak {got['GiB']:.1f} GiB",
            flush=True,
        )
    if len(best) == 2:
        same = {True: ", the same tokens", False: ", OTHER TOKENS"}[tokens["ours"] == tokens["theirs"]]
        print(
            f"{model} batch {batch:2d} ratio {best['ours'] / best['theirs']:.2f}{same if on_cpu(model) else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
