"""R1-Zero's claim in minutes on a CPU: reward for the outcome alone makes answers right and long.

    python experiments/r1_zero_small/run.py --seed 0          # one seed; its last line is a JSON object
    python experiments/r1_zero_small/run.py --study           # all seeds and controls; results.jsonl and curves.png

A base model is pre-trained from nothing on sums modulo 10, most written down with their answer alone, a minority with
their steps. Pre-training ends when the model solves most problems of which it writes the steps (the gate: skill, not
steps). Then GRPO rewards nothing but the last character. Everything is the project's own training, engine and GRPO.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import deepseek_jax as dsj
from deepseek_jax.config import GQA, Dense, ModelConfig, Rope
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.sources import Jsonl
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.grpo import grpo
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.policy import variables_of
from deepseek_jax.posttrain.prompts import Problems, Prompter
from deepseek_jax.posttrain.rewards import Accuracy, Custom
from deepseek_jax.posttrain.sampler import Sampler
from deepseek_jax.posttrain.tasks import RunningSum, split_of
from deepseek_jax.training import AdamW, MultiStep, RunConfig

HERE = Path(__file__).resolve().parent
DIGITS = 6
TASK = RunningSum(digits=DIGITS)
PROMPT, ANSWER = DIGITS + 1, DIGITS + 3  # tokens: a beginning; ":", steps but the last, "=", answer, an end
GATE = 0.85
"""Accuracy, at temperature 1, of the completions that write their steps, from which the base model is good enough."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run of the study varies."""

    seed: int = 0
    written: float = 0.3
    """Share of the corpus' documents that write their steps down."""
    shuffled: bool = False
    """Rewards that have nothing to do with the answer: a coin that is as lucky as the base model."""
    loss: PolicyLoss = field(
        default_factory=lambda: PolicyLoss(aggregation="dr_grpo", max_tokens=ANSWER, clip_high=0.28, kl=0.0)
    )
    grpo_steps: int = 30
    documents: int = 60_000
    pretraining_steps: int = 2000
    """At most; the gate ends it earlier."""


def model() -> ModelConfig:
    """DeepSeek LLM, very small: bytes for tokens, 2 layers of width 64. The papers' initialisation of 0.006 is for wide
    models; this narrow one learns the task from 0.1 in a third of the steps."""
    return ModelConfig(
        name="r1-zero-small", vocab_size=259, hidden_size=64, num_hidden_layers=2, max_position_embeddings=128,
        attention=GQA(num_attention_heads=8, num_key_value_heads=8, head_dim=8), ffn=Dense(intermediate_size=256),
        rope=Rope(), bos_token_id=0, eos_token_id=1, dtype="float32", param_dtype="float32", initializer_range=0.1,
    )  # fmt: skip


def write_corpus(path: Path, setting: Setting) -> None:
    """Documents of the train split alone: problem, steps in a minority, answer."""
    rng = np.random.default_rng(setting.seed)
    numbers = rng.integers(0, 10, (setting.documents, DIGITS))
    sums = np.cumsum(numbers, axis=1) % 10
    written = rng.random(setting.documents) < setting.written
    with path.open("w", encoding="utf-8") as file:
        for row, steps, writes in zip(numbers.tolist(), sums.tolist(), written.tolist(), strict=True):
            prompt = "".join(map(str, row))
            if split_of(prompt) == "train":
                said = ":" + "".join(map(str, steps[:-1])) if writes else ""
                file.write('{"text": "' + f"{prompt}{said}={steps[-1]}" + '"}\n')


def pretrain(setting: Setting, folder: Path) -> tuple[Path, bool]:
    """The base model's run folder, and whether it reached the gate."""
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, setting)
    config = RunConfig(
        model=model(),
        data=DataConfig(
            sources=(Jsonl(path=str(corpus)),), tokenizer="bytes", cross_document_attention=False,
            cache_dir=str(folder / "cache"),
        ),
        schedule=MultiStep(peak=2e-3, warmup_steps=50, milestones=(), factors=()),
        optimizer=AdamW(weight_decay=0.01),
        steps=setting.pretraining_steps, batch_size=32, seq_len=128, seed=setting.seed,
        log_every=100, eval_every=50, eval_sequences=16, checkpoint_every=10**6,
    )  # fmt: skip
    sampler: list[Sampler] = []
    gated: list[bool] = [False]

    def until(state: Any, step: int) -> bool:
        if not sampler:
            tokenizer = byte_tokenizer()
            sampler.append(
                Sampler(
                    dsj.DeepSeek(config.model), Prompter.of(tokenizer, None), max_prompt_tokens=PROMPT,
                    max_new_tokens=ANSWER, slots=128,
                )
            )  # fmt: skip
        sampler[0].load(variables_of(state.params, state.router))
        problems = Problems(TASK, "train", setting.seed).take(128)
        completions = sampler[0].complete(problems, 4, f"gate/{step}", temperature=1.0)
        right = [c.text[-1:] == c.problem.answer for c in completions if c.text.startswith(":")]
        share = float(np.mean(right)) if len(right) >= 20 else 0.0
        print(
            f"step {step}: {len(right)} of {len(completions)} completions write their steps, {share:.2f} of them right"
        )
        gated[0] = share > GATE
        return gated[0]

    run_dir = folder / "base"
    dsj.train(config, run_dir, until=until)
    return run_dir, gated[0]


def coin(problem: Any, completion: str) -> float:
    """A reward that knows nothing: decided by the completion's own characters, the same each time it is asked."""
    return float(np.random.default_rng(list(f"{problem.prompt}{completion}".encode())).random() < 0.3)


def reinforce(setting: Setting, base: Path, folder: Path) -> dict[str, Any]:
    """GRPO from the base model; the greedy accuracy and length before and after, and the curve."""
    reward = Custom(function=f"{__name__}:coin", name="accuracy") if setting.shuffled else Accuracy(verifier="plain")
    config = GRPO(
        init_from=str(base), problems=TASK, rewards=(reward,), loss=setting.loss, advantages="none",
        steps=setting.grpo_steps, rate=Rate(peak=3e-4), optimizer=AdamW(weight_decay=0.0), prompts=32, samples=8,
        max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, slots=256, eval_problems=256, seed=setting.seed,
        checkpoint_every=10**6, max_barren_steps=10**6,
    )  # fmt: skip
    run = grpo(config, folder / "rl")
    before, after = (line["evaluation"] for line in run.metrics if "evaluation" in line)
    curve = [
        {name: line[name] for name in ("step", "reward", "length_mean", "zero_variance", "kl", "entropy")}
        for line in run.metrics
        if "reward" in line
    ]
    return {
        "greedy_before": before["accuracy"], "greedy_after": after["accuracy"],
        "length_before": before["length"], "length_after": after["length"], "curve": curve,
    }  # fmt: skip


def demonstrate(setting: Setting, folder: Path) -> dict[str, Any]:
    """Pre-training up to the gate, then GRPO; without `greedy_after` where the gate was not reached."""
    began = time.perf_counter()
    base, gated = pretrain(setting, folder)
    trained = time.perf_counter()
    result: dict[str, Any] = {"seed": setting.seed, "gated": gated}
    if gated:
        result |= reinforce(setting, base, folder)
    ended = time.perf_counter()
    return result | {"pretraining_seconds": round(trained - began, 1), "seconds": round(ended - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = demonstrate(Setting(seed=options.seed), Path(folder))
    for line in result.pop("curve", ()):
        print(f"GRPO step {line['step']}: reward {line['reward']:.3f}, {line['length_mean']:.1f} tokens")
    print(json.dumps(result))
    sys.exit(0 if result["gated"] else 1)


if __name__ == "__main__":
    main()
