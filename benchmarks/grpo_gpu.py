"""GRPO end to end beside TRL's GRPOTrainer on one GPU: rollouts, rewards and reference, and the update; new tokens/s.

A dense model of Qwen2.5-0.5B's shape with random weights, which both sides read from one folder in bfloat16 (parameters,
moments, compute); 16 prompts of 128 tokens, 8 completions each, all of 256 tokens since the end token is one that the
model has no row for. One update a rollout, β = 0.04 with a reference, temperature 1, the whole vocabulary.

    python benchmarks/grpo_gpu.py [--peers dynamic continuous] [--prompts 16 --group 8] [--pieces 4] [--remat none]
    JAX_PLATFORMS=cpu python benchmarks/grpo_gpu.py --small

TRL generates with transformers: `generate` with a dynamic or a static cache (TRL switches compiling off), or continuous
batching. Each side has a process of its own; a figure is the tokens of all completions over the whole step, the median of
the steps after two of warm-up. A side that runs out of memory is tried once more with twice the pieces of an update. Both
must have made the tokens asked for, and give one prompt the same log-probability. One line of JSON follows the table.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SHAPES = {  # of Qwen2.5-0.5B, and one for trying the script
    False: dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, rope_theta=1000000.0, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
    True: dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True, max_position_embeddings=256,
    ),
}  # fmt: skip
WARM_UP, BETA, LEARNING_RATE = 2, 0.04, 1e-6
CONTINUOUS = dict(  # a tenth of the card is several times what these completions need
    use_transformers_continuous_batching=True, transformers_continuous_batching_config=dict(max_memory_percent=0.1)
)


def prompts(options: argparse.Namespace) -> list[list[list[int]]]:
    """Ids of every step's prompts."""
    import numpy as np

    shape = (WARM_UP + options.steps, options.prompts, options.length)
    return np.random.default_rng(0).integers(1, SHAPES[options.small]["vocab_size"], shape).tolist()


def reward(tokens: list[int]) -> float:
    """Share of even ids: any rule will do, as long as it is not the same for all."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


def ours(options: argparse.Namespace) -> dict:
    """Seconds of each step and of its parts."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    import deepseek_jax as dsj
    from deepseek_jax.posttrain.policy import token_logprobs

    model, variables = dsj.load_hf(options.folder, options.dtype, progress=False)
    model = dsj.DeepSeek(dataclasses.replace(model.config, remat=options.remat))
    logp = float(token_logprobs(model, variables, jnp.asarray(prompts(options)[0][:1]))[0].mean())
    steps = our_steps(options, model, variables)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    return {"steps": steps, "GiB": peak, "logp": logp, "versions": versions}


def our_steps(options: argparse.Namespace, model, variables) -> list[dict]:
    """The loop from its parts, as `posttrain.grpo` runs it, without its folder, log and checkpoints."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tokenizers import Tokenizer

    from deepseek_jax.infer.engine import Engine, Request
    from deepseek_jax.infer.sampling import Sampling
    from deepseek_jax.posttrain.advantage import group_advantages
    from deepseek_jax.posttrain.objective import PolicyLoss
    from deepseek_jax.posttrain.policy import init_policy, make_update, variables_of
    from deepseek_jax.posttrain.rollout import pack, require_same
    from deepseek_jax.training import AdamW

    tokenizer = Tokenizer.from_file(f"{options.folder}/tokenizer.json")
    optimizer = AdamW(moment_dtype="bfloat16" if options.dtype == "bfloat16" else "float32")
    # All on one device by order: a part of the state that could move would have the update compiled twice.
    state = jax.device_put(init_policy(optimizer, variables, reference=True), jax.devices()[0])
    jax.tree.map(lambda leaf: leaf.delete(), variables)  # the state has copies
    loss = PolicyLoss(kl=BETA, unbiased_kl=True)
    update = make_update(model, loss, optimizer, chunk=options.chunk, pieces=options.pieces)
    rows, places = options.prompts * options.group, options.length + options.new
    engine = Engine(
        model, None, slots=rows, places=places, chunk=options.length, decode_steps=min(64, options.new),
        prefill_rows=options.prompts,
    )  # fmt: skip
    group = np.arange(rows, dtype=np.int32) // options.group
    steps = []
    for number, batch in enumerate(prompts(options)):
        start = time.perf_counter()
        engine.load(variables_of(state.params, state.router))
        require_same(model, variables_of(state.params, state.router), engine.weights)
        generations = engine.generate([
            Request(
                prompt=prompt, samples=options.group,
                sampling=Sampling(max_new_tokens=options.new, temperature=1.0, seed=number * len(batch) + i),
            )
            for i, prompt in enumerate(batch)
        ])  # fmt: skip
        rolled_out = time.perf_counter()
        tokenizer.decode_batch([generation.tokens for generation in generations])  # TRL decodes for the rewards too
        rewards = jnp.asarray([reward(generation.tokens) for generation in generations], jnp.float32)
        advantages, _ = group_advantages(rewards, group, options.prompts)
        rollouts = pack([batch[i] for i in group], generations, advantages, places - 1)
        state, metrics = update(state, rollouts, jnp.float32(LEARNING_RATE))
        jax.block_until_ready((state, metrics))
        end = time.perf_counter()
        assert metrics["applied"], metrics
        tokens = sum(len(generation.tokens) for generation in generations)
        steps.append({"s": end - start, "rollout_s": rolled_out - start, "tokens": tokens})
    return steps


def theirs(options: argparse.Namespace) -> dict:
    """TRL: seconds of each step, and of its generation."""
    import torch
    import transformers
    import trl
    from datasets import Dataset

    cuda = torch.cuda.is_available()
    texts = [" ".join(f"w{i}" for i in ids) for batch in prompts(options) for ids in batch]
    rows = options.prompts * options.group
    generation = dict(dynamic={}, static=dict(cache_implementation="static"), continuous=CONTINUOUS)[options.peer]
    config = trl.GRPOConfig(
        output_dir=f"{options.folder}/trl", report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, use_cpu=not cuda, bf16=options.dtype == "bfloat16", seed=0,
        model_init_kwargs=dict(dtype=options.dtype, attn_implementation="sdpa"),
        per_device_train_batch_size=rows // options.pieces, gradient_accumulation_steps=options.pieces,
        gradient_checkpointing=options.remat != "none", max_steps=WARM_UP + options.steps,
        num_generations=options.group, max_completion_length=options.new, temperature=1.0, beta=BETA,
        loss_type="grpo", learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.1, adam_beta2=0.95,
        max_grad_norm=1.0, shuffle_dataset=False, **generation,
    )  # fmt: skip
    counts, turns, times = [], [], []

    def even(completion_ids, **_) -> list[float]:
        counts.append(sum(map(len, completion_ids)))
        return [reward(ids) for ids in completion_ids]

    def clock() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(clock())

        on_step_end = on_train_begin

    tokenizer = transformers.PreTrainedTokenizerFast(  # by its class, since qwen2's would split words into bytes
        tokenizer_file=f"{options.folder}/tokenizer.json", eos_token="<end>", pad_token="w0", padding_side="left"
    )
    data = Dataset.from_dict({"prompt": texts})
    trainer = trl.GRPOTrainer(options.folder, even, config, data, processing_class=tokenizer, callbacks=[Clock()])
    assert tokenizer(text=texts[:1])["input_ids"] == prompts(options)[0][:1], "TRL reads other prompts"
    with torch.no_grad():
        ids = torch.tensor(prompts(options)[0][:1], device=trainer.accelerator.device)
        logits = trainer.model(ids).logits[0, :-1].float()
        logp = -torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    generate = trainer._generate_single_turn

    def timed(*arguments, **named):
        start = clock()
        out = generate(*arguments, **named)
        turns.append(clock() - start)
        return out

    trainer._generate_single_turn = timed
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(times)]
    steps = [{"s": s, "rollout_s": r, "tokens": n} for s, r, n in zip(seconds, turns, counts, strict=True)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    versions = {module.__name__: module.__version__ for module in (trl, transformers, torch)}
    versions["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    return {"steps": steps, "GiB": peak, "logp": logp, "versions": versions}


def write(options: argparse.Namespace) -> None:
    """A published checkpoint with random weights, and a tokenizer whose word wN is token N."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = SHAPES[options.small]
    rope = dict(rope_type="default", rope_theta=shape["rope_theta"])
    config = transformers.Qwen2Config(
        **{k: v for k, v in shape.items() if k != "rope_theta"}, rope_parameters=rope, rms_norm_eps=1e-6,
        use_sliding_window=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None
    model.save_pretrained(options.folder)
    words = {f"w{i}": i for i in range(shape["vocab_size"])} | {"<end>": shape["vocab_size"]}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(f"{options.folder}/tokenizer.json")


def child(side: str, options: argparse.Namespace, **fields) -> dict | str | None:
    """What a side prints last, from a process of its own; the end of its complaint where it fails."""
    words = [sys.executable, __file__, "--side", side, *(["--small"] if options.small else [])]
    given = {name: getattr(options, name) for name in ("prompts", "group", "length", "new", "steps", "remat", "chunk")}
    for name, value in (given | fields).items():
        words += [f"--{name}", str(value)]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | quiet, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return f"not ready after {options.limit} s"
    if done.returncode:
        return "\n".join(done.stderr.strip().splitlines()[-8:])[-1500:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=["dynamic"], choices=["dynamic", "static", "continuous"])
    for name, default in dict(prompts=16, group=8, length=128, new=256, steps=5, pieces=4).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int, default=64, help="places whose logits exist at once, of ours")
    parser.add_argument("--limit", type=int, default=240, help="seconds that a side may take")
    parser.add_argument("--remat", default="none", choices=["none", "full"], help="gradient checkpointing, of both")
    parser.add_argument("--small", action="store_true", help="a tiny model in float32: does the script work?")
    for name in ("side", "peer", "folder", "dtype"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return print(json.dumps({"ours": ours, "theirs": theirs, "write": write}[options.side](options)))
    if options.small:
        options.prompts, options.group, options.length, options.new, options.steps = 4, 4, 16, 8, 3
    dtype = "float32" if options.small else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(said := child("write", options, folder=folder, dtype=dtype), str):
            sys.exit(said)
        results, got, pieces = {}, "", 0
        for name, side, peer in [("ours", "ours", "none"), *((f"TRL {p}", "theirs", p) for p in options.peers)]:
            for pieces in (options.pieces, 2 * options.pieces):
                got = child(side, options, pieces=pieces, folder=folder, dtype=dtype, peer=peer)
                if not isinstance(got, str) or not any(w in got for w in ("out of memory", "RESOURCE_EXHAUSTED")):
                    break
            if isinstance(got, str):
                print(f"{name}: failed\n{got}\n", flush=True)
                continue
            results[name] = summary(got, pieces, options)
            print(f"{name}: steps of {[round(step['s'], 3) for step in got['steps']]} s", flush=True)
    report(results, options)


def summary(got: dict, pieces: int, options: argparse.Namespace) -> dict:
    """Medians and ranges of the steps after the warm-up; every step must have made all its tokens."""
    asked, steps = options.prompts * options.group * options.new, got["steps"][WARM_UP:]
    counts = {step["tokens"] for step in got["steps"]}
    assert len(got["steps"]) == WARM_UP + options.steps and counts == {asked}, f"{counts} tokens a step, not {asked}"
    speeds = [step["tokens"] / step["s"] for step in steps]
    return {
        "tok/s": statistics.median(speeds), "least": min(speeds), "most": max(speeds),
        "step_s": statistics.median(step["s"] for step in steps),
        "rollout_s": statistics.median(step["rollout_s"] for step in steps),
        "rollout_share": statistics.median(step["rollout_s"] / step["s"] for step in steps),
        "first_s": got["steps"][0]["s"], "GiB": got["GiB"], "pieces": pieces, "logp": got["logp"], **got["versions"],
    }  # fmt: skip


def report(results: dict[str, dict], options: argparse.Namespace) -> None:
    """The table, the ratios, and the same as one line of JSON."""
    print(f"\n{'':15s}   tok/s      (least to most)    step   rollout  share  the rest  peak GiB  pieces  first step")
    for name, r in results.items():
        print(
            f"{name:15s} {r['tok/s']:7.0f}  ({r['least']:7.0f} to {r['most']:7.0f})  {r['step_s']:5.2f} s  "
            f"{r['rollout_s']:5.2f} s  {100 * r['rollout_share']:3.0f} %  {r['step_s'] - r['rollout_s']:6.2f} s  "
            f"{r['GiB']:8.1f}  {r['pieces']:6d}  {r['first_s']:8.1f} s"
        )
    peers = {name: r for name, r in results.items() if name != "ours"}
    if "ours" in results and peers:
        best = max(peers, key=lambda name: peers[name]["tok/s"])
        print(f"ratio to {best}: {results['ours']['tok/s'] / peers[best]['tok/s']:.2f}")
        apart = max(abs(r["logp"] - results["ours"]["logp"]) for r in peers.values())
        tolerance = 1e-4 if options.small else 0.02
        print(f"mean log p of one prompt: {apart:.1e} apart{'' if apart < tolerance else ': OTHER WEIGHTS'}")
    print(json.dumps({"settings": vars(options), "results": results}))


if __name__ == "__main__":
    main()
