"""The training step of deepseek-v3-nano beside the same model in torch + transformers, on the CPU, in one run.

    python benchmarks/nano_vs_torch.py [--rounds 5] [--steps 20] [--threads N] [--setting SETTING]

Needs the parity extra: pip install -e '.[parity]'.

A step is forward, backward, clipping by global norm and AdamW, in float32 on random tokens. Both sides leave out what
transformers does not train: multi-token prediction and the sequence-wise balance loss. Our step still updates the
selection bias (with speed 0) and computes the metrics that a run logs.

1. Both sides load one random checkpoint. Numbers of parameters must be equal, and so must the losses of the first
   steps, each to 1e-4: the same model, objective and optimizer.
2. torch's settings are tried in turn (attention, experts, torch.compile), and the fastest is measured.
3. Each round runs ours and theirs one after the other, each in a process of its own with the same cores. A process
   counts with the median of its steps; a figure is the median over rounds, its spread (max - min) / median.
   Memory is the largest resident set of a process, its imports and compilation included.
"""

import argparse
import copy
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# No jax, torch or numpy up here: a child's largest resident set is at least that of the process that started it.

TESTS = Path(__file__).resolve().parent.parent / "tests"
LEARNING_RATE = 1e-3
CHECKED_STEPS, WARM_UP, TOLERANCE = 4, 3, 1e-4
# Attention, experts, whether torch.compile. --setting also takes what is not tried, since it is slower by far: batched_mm
# copies the weights of each token's experts, and each expert's number of tokens is a new shape to compile the eager ones for.
SETTINGS = (
    "sdpa,grouped_mm,eager", "sdpa,eager,eager", "eager,grouped_mm,eager", "eager,eager,eager",
    "sdpa,grouped_mm,compile", "eager,grouped_mm,compile",
)  # fmt: skip
SETTING_SECONDS = 300  # after which a setting that is tried is given up


def model_config():
    """deepseek-v3-nano without the parts that transformers does not train."""
    import deepseek_jax as dsj

    nano = dsj.get_config("deepseek-v3-nano")
    return dataclasses.replace(
        nano, num_nextn_predict_layers=0, ffn=dataclasses.replace(nano.ffn, sequence_loss_alpha=0.0)
    )


def published_config(config) -> dict:
    """The config.json of `config`."""
    fields = dataclasses.asdict(config)
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "initializer_range",
    )  # fmt: skip
    routing = (
        "intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        "first_k_dense_replace", "scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor",
    )  # fmt: skip
    return {
        "model_type": "deepseek_v3", "hidden_act": "silu", "attention_bias": False,
        "num_key_value_heads": config.attention.num_attention_heads, **fields["attention"],
        "rope_theta": config.rope.theta, "rope_scaling": {"type": "yarn", **fields["rope"]["scaling"]},
        **{name: fields[name] for name in names}, **{name: fields["ffn"][name] for name in routing},
    }  # fmt: skip


def random_batches(options: argparse.Namespace, vocab_size: int, count: int = 8) -> list:
    """Random tokens, int32 [batch, seq_len + 1] each."""
    import numpy as np

    draw = np.random.default_rng(options.seed)
    shape = (options.batch, options.seq_len + 1)
    return [draw.integers(0, vocab_size, shape, dtype=np.int32) for _ in range(count)]


def measured(step, batches: list, options: argparse.Namespace) -> dict:
    """Losses of the first steps, then seconds of `options.steps` more; `step` returns when the new weights are there."""
    import resource

    losses = [step(batches[i % len(batches)]) for i in range(CHECKED_STEPS if options.check else WARM_UP)]
    seconds = []
    for i in range(0 if options.check else options.steps):
        start = time.perf_counter()
        step(batches[i % len(batches)])
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"losses": losses, "seconds": seconds, "peak_bytes": peak}


def ours(options: argparse.Namespace) -> dict:
    """Our side; in a process of its own, like the next two."""
    import jax
    import jax.numpy as jnp
    from safetensors.numpy import load_file

    from deepseek_jax.data.config import DataConfig
    from deepseek_jax.parallel.mesh import MeshConfig, make_mesh, use_mesh
    from deepseek_jax.training import MultiStep, RunConfig
    from deepseek_jax.training.state import abstract_state, new_state
    from deepseek_jax.training.step import compile_train_step, place_batch

    sys.path.insert(0, str(TESTS))
    from hf_weights import hf_to_model_config, hf_to_variables

    folder, model = Path(options.checkpoint), model_config()
    described = hf_to_model_config(json.loads((folder / "config.json").read_text()))
    same = dataclasses.replace(described, name=model.name, initializer_range=model.initializer_range)
    assert same == model, f"the checkpoint is of another model:\n{same}\n{model}"
    config = RunConfig(
        model=model, data=DataConfig(vocab_size=model.vocab_size), bias_update_speed=0.0,
        schedule=MultiStep(peak=LEARNING_RATE, warmup_steps=0, milestones=(), factors=()),
        steps=options.steps, batch_size=options.batch, seq_len=options.seq_len,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig())
    weights = jax.tree.map(jnp.asarray, hf_to_variables(load_file(folder / "model.safetensors"), model))
    with use_mesh(mesh):
        state = new_state(config, weights["params"], weights["router"])
        # Placed as a step returns it, else the second step would compile anew.
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)))
        train_step = compile_train_step(config, mesh)

        def step(tokens) -> float:
            nonlocal state
            state, metrics = train_step(state, place_batch({"tokens": tokens}, mesh))
            jax.block_until_ready(state)
            return float(metrics["loss"])

        count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        batches = random_batches(options, model.vocab_size)
        return {"parameters": count, **measured(step, batches, options)}


def theirs(options: argparse.Namespace) -> dict:
    """transformers' side."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    attention, experts, mode = options.setting.split(",")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.checkpoint, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    ).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def objective(inputs, targets):
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if mode == "compile":
        objective = torch.compile(objective)

    def step(tokens) -> float:
        tokens = torch.from_numpy(tokens).long()
        loss = objective(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, **measured(step, random_batches(options, model.config.vocab_size), options)}


def make_checkpoint(options: argparse.Namespace) -> dict:
    """Random weights, drawn by transformers, in the published layout."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    published = published_config(model_config())
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**copy.deepcopy(published)))
    model.save_pretrained(options.checkpoint)
    # transformers writes a config.json with its own names; both sides read the published one.
    (Path(options.checkpoint) / "config.json").write_text(json.dumps(published, indent=1))
    return {}


ROLES = {"ours": ours, "theirs": theirs, "checkpoint": make_checkpoint}


class Failed(Exception):
    """What a child that came to nothing said last."""


def child(role: str, options: argparse.Namespace, limit: float | None = None, **changes) -> dict:
    """Result of one role in a fresh process."""
    given = json.dumps({**vars(options), "child": None, "check": False, **changes, "role": role})
    threads = str(options.threads)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", given], env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # torch's compiler has processes of its own
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"given up after {limit} s") from None
        raise
    if process.returncode:
        raise Failed((errors.strip() or f"exit status {process.returncode}").splitlines()[-1])
    return json.loads(out.splitlines()[-1])


def run_child(options: argparse.Namespace) -> None:
    """In a child: its result as the last line of its output."""
    if hasattr(os, "sched_setaffinity"):  # the pools of XLA and of torch's compiler are as large as this set
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    print(f"\n{json.dumps(ROLES[options.role](options))}", flush=True)


def check_equal(options: argparse.Namespace) -> None:
    """Stops unless both sides train the same model in the same way."""
    us = child("ours", options, check=True)
    them = child("theirs", options, check=True, setting=options.setting or SETTINGS[0])
    print(f"# parameters: ours {us['parameters']:,}, theirs {them['parameters']:,}")
    equal = us["parameters"] == them["parameters"]
    for i, (a, b) in enumerate(zip(us["losses"], them["losses"], strict=True)):
        equal &= abs(a - b) <= TOLERANCE * abs(b)
        print(f"# loss of step {i + 1}: ours {a:.6f}, theirs {b:.6f}, apart {abs(a - b) / abs(b):.1e}", flush=True)
    if not equal:
        sys.exit("the two sides do not train the same model: no figure")


def fastest_setting(options: argparse.Namespace) -> str:
    """torch's best setting, by a short run of each."""
    times = {}
    for setting in SETTINGS:
        try:
            tried = child("theirs", options, SETTING_SECONDS, setting=setting, steps=min(options.steps, 5))
            times[setting] = statistics.median(tried["seconds"])
            print(f"# torch, {setting}: {tokens_per_second(options, times[setting]):,.0f} tokens/s", flush=True)
        except Failed as error:
            print(f"# torch, {setting}: {error}", flush=True)
    if not times:
        sys.exit("no setting of torch works here")
    return min(times, key=times.__getitem__)


def tokens_per_second(options: argparse.Namespace, seconds: float) -> float:
    return options.batch * options.seq_len / seconds


def has_peers() -> bool:
    """Whether the parity extra is there."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return False
    version = importlib.metadata.version("transformers")
    return tuple(int(part) for part in version.split(".")[:2]) >= (5, 23)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


HEAD = (
    "| date | device | versions | batch | tokens/s, ours (spread) | tokens/s, torch (spread) | ratio (lowest to highest) "
    "| MiB, ours | MiB, torch | ratio | torch's setting | command |\n" + 12 * "|---" + "|"
)


def report(options: argparse.Namespace, rounds: list[tuple[dict, dict]]) -> None:
    """The row of docs/benchmarks.md."""
    sides = list(zip(*rounds, strict=True))
    rates = [[tokens_per_second(options, statistics.median(r["seconds"])) for r in side] for side in sides]
    peaks = [statistics.median(r["peak_bytes"] for r in side) / 2**20 for side in sides]
    ratios = [a / b for a, b in zip(*rates, strict=True)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", "transformers"))
    command = f"`python benchmarks/nano_vs_torch.py {' '.join(sys.argv[1:])}".strip() + "`"
    cells = [
        datetime.date.today().isoformat(),
        f"{cpu_name()}, {options.threads} cores",
        f"Python {platform.python_version()}, {versions}",
        f"{options.batch} × {options.seq_len}",
        *(f"{statistics.median(x):,.0f} ({(max(x) - min(x)) / statistics.median(x):.0%})" for x in rates),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        *(f"{peak:,.0f}" for peak in peaks),
        f"{peaks[0] / peaks[1]:.2f}",
        options.setting,
        command,
    ]
    print(HEAD)
    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, one after the other")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--seq-len", type=int, default=256, dest="seq_len", help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=cores, help="cores that each side gets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--setting", help=f"torch's, instead of trying {' '.join(SETTINGS)}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_child(argparse.Namespace(**json.loads(options.child)))
    if not has_peers():
        sys.exit("needs torch and transformers >= 5.23, the parity extra: pip install -e '.[parity]'")
    with tempfile.TemporaryDirectory() as folder:
        options.checkpoint = folder
        try:
            child("checkpoint", options)
            check_equal(options)
            options.setting = options.setting or fastest_setting(options)
            rounds = []
            for _ in range(options.rounds):
                rounds.append((child("ours", options), child("theirs", options)))
                pair = [tokens_per_second(options, statistics.median(side["seconds"])) for side in rounds[-1]]
                print(f"# round {len(rounds)}: ours {pair[0]:,.0f}, theirs {pair[1]:,.0f} tokens/s", flush=True)
        except Failed as error:
            sys.exit(f"a side failed: {error}")
        report(options, rounds)


if __name__ == "__main__":
    main()
