"""R1-Zero's claim in minutes on a CPU: reward for the outcome alone makes answers right and long.

    python experiments/r1_zero_small/run.py --seed 0    # one seed; its last line is a JSON object
    python experiments/r1_zero_small/run.py --study     # all seeds and controls (study.py): results.jsonl, curves.png

A base model is pre-trained from nothing on sums modulo 10, most written down with their answer alone, a minority with
their steps. Pre-training ends when the model solves most problems of which it writes the steps (the gate: skill, not
steps). Then GRPO rewards nothing but the last character. Everything is the project's own training, engine and GRPO.

A seed whose base does not reach the gate is not trained further: "gated" is false then, and the exit status 1.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
from deepseek_jax.posttrain.rewards import Accuracy, ModelReward, plain_accuracy
from deepseek_jax.posttrain.sampler import Completion, Sampler
from deepseek_jax.posttrain.tasks import RunningSum, split_of
from deepseek_jax.training import AdamW, MultiStep, RunConfig

DIGITS = 6
TASK = RunningSum(digits=DIGITS)
PROMPT, ANSWER = DIGITS + 1, DIGITS + 3  # tokens: a beginning; ":", steps but the last, "=", answer, an end
SLOTS = 256  # completions decoded at once; the gate has as many as GRPO, so that the same programs serve both


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run varies."""

    seed: int = 0
    written: float = 0.3
    """Share of the corpus' documents that write their steps down."""
    documents: int = 40_000
    gate: float | None = 0.85
    """Accuracy, at temperature 1, of the completions that write their steps, from which the base is good enough; None:
    pre-training takes all its steps."""
    pretraining_steps: int = 3000
    """At most. Seeds need 400 to 1000; the limit ends a seed that learns nothing within minutes."""
    gate_every: int = 100
    gate_problems: int = 128
    loss: PolicyLoss = field(
        default_factory=lambda: PolicyLoss(aggregation="dr_grpo", max_tokens=ANSWER, clip_high=0.28, kl=0.0)
    )
    shuffled: bool = False
    """Rewards dealt out anew among the completions of a step: as many, to whomever."""
    grpo_steps: int = 40
    prompts: int = 32
    eval_problems: int = 256


def model() -> ModelConfig:
    """DeepSeek LLM, very small: bytes for tokens, 2 layers of width 64. The papers' initialisation of 0.006 is for wide
    models; this narrow one learns the task from 0.1 in a third of the steps."""
    return ModelConfig(
        name="r1-zero-small", vocab_size=259, hidden_size=64, num_hidden_layers=2, max_position_embeddings=64,
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


def skill(completions: Sequence[Completion]) -> dict[str, float]:
    """The share that writes its steps, and how often these and the others are right."""
    right = {True: [], False: []}
    for c in completions:
        right[c.text.startswith(":")].append(plain_accuracy(c.problem, c.text))
    return {
        "writes_steps": len(right[True]) / len(completions),
        "right_with_steps": float(np.mean(right[True])) if len(right[True]) >= 20 else 0.0,  # of few: says nothing
        "right_without": float(np.mean(right[False])) if right[False] else 0.0,
    }


def pretrain(setting: Setting, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The base model's run folder, and what it came to: whether it is through the gate (None: there is none), its steps and
    skill."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = folder / "corpus.jsonl"
    write_corpus(corpus, setting)
    config = RunConfig(
        model=model(),
        data=DataConfig(
            sources=(Jsonl(path=str(corpus)),), tokenizer="bytes", cross_document_attention=False,
            cache_dir=str(folder / "cache"),
        ),
        schedule=MultiStep(peak=1.5e-3, warmup_steps=50, milestones=(), factors=()),
        optimizer=AdamW(weight_decay=0.01), steps=setting.pretraining_steps, batch_size=16, seq_len=64,
        seed=setting.seed, log_every=100, eval_every=setting.gate_every, eval_sequences=16, checkpoint_every=10**6,
    )  # fmt: skip
    sampler = Sampler(
        dsj.DeepSeek(config.model), Prompter.of(byte_tokenizer(), None), max_prompt_tokens=PROMPT,
        max_new_tokens=ANSWER, slots=SLOTS,
    )  # fmt: skip
    problems = Problems(TASK, "train", setting.seed).take(setting.gate_problems)
    found: dict[str, Any] = {"gated": None if setting.gate is None else False}

    def until(state: Any, step: int) -> bool:
        sampler.load(variables_of(state.params, state.router))
        found.update(skill(sampler.complete(problems, 4, f"gate/{step}", temperature=1.0)), pretraining_steps=step)
        say(
            f"pre-training step {step}: {found['writes_steps']:.0%} of the completions write their steps, "
            f"{found['right_with_steps']:.0%} of these are right, {found['right_without']:.0%} of the others"
        )
        if setting.gate is not None and found["right_with_steps"] > setting.gate:
            found["gated"] = True
        return bool(found["gated"])

    run_dir = folder / "base"
    say(f"pre-training, until {setting.gate:.0%} with steps are right" if setting.gate else "pre-training")
    dsj.train(config, run_dir, until=until, progress=False)
    return run_dir, found


def shuffled_accuracy(seed: int) -> Any:
    """A reward model that deals out the accuracies of a call's completions anew among them: their mean stays true, and
    whom one goes to has nothing to do with what that one wrote."""
    rng = np.random.default_rng(seed)
    return lambda items: rng.permutation([plain_accuracy(item.problem, item.completion) for item in items])


def reinforce(setting: Setting, base: Path, run_dir: Path) -> dict[str, Any]:
    """GRPO from the base model; the greedy accuracy and length on the test split before and after, and the curve."""
    reward = ModelReward(path="shuffled", name="accuracy") if setting.shuffled else Accuracy(verifier="plain")
    config = GRPO(
        init_from=str(base), template="none", problems=TASK, rewards=(reward,), loss=setting.loss, advantages="none",
        steps=setting.grpo_steps, rate=Rate(peak=3e-4), optimizer=AdamW(weight_decay=0.0), prompts=setting.prompts,
        samples=8, max_prompt_tokens=PROMPT, max_new_tokens=ANSWER, slots=SLOTS, eval_problems=setting.eval_problems,
        seed=setting.seed, checkpoint_every=10**6, max_barren_steps=10**6, writers=(f"{__name__}:Told",),
    )  # fmt: skip
    say("GRPO, rewarded by the last character alone" + (", the rewards shuffled" if setting.shuffled else ""))
    run = grpo(config, run_dir, open_model=lambda _: shuffled_accuracy(setting.seed), progress=False)
    before, after = (line["evaluation"] for line in run.metrics if "evaluation" in line)
    return {
        "greedy_before": before["accuracy"], "greedy_after": after["accuracy"],
        "length_before": before["length"], "length_after": after["length"],
        "curve": {
            name: [round(float(line[name]), 4) for line in run.metrics if "reward" in line]
            for name in ("reward", "length_mean", "zero_variance", "kl", "entropy")
        },
    }  # fmt: skip


class Told:
    """A writer of metrics for the person who watches: a line a step."""

    def __init__(self, run_dir: Any, config: Mapping[str, Any]):
        pass

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if "reward" in values:
            say(f"GRPO step {step}: {values['reward']:.0%} right at temperature 1, {values['length_mean']:.1f} tokens")
        if (greedy := values.get("evaluation")) is not None:
            say(f"greedy, on problems of the test split: {greedy['accuracy']:.1%} right, {greedy['length']:.1f} tokens")

    def close(self) -> None:
        pass


def say(text: str) -> None:
    print(text, flush=True)


def demonstrate(setting: Setting, folder: Path) -> dict[str, Any]:
    """Pre-training up to the gate, then GRPO; without `greedy_before` and its like where the gate was not reached."""
    began, cpu = time.perf_counter(), time.process_time()
    base, found = pretrain(setting, folder)
    trained = time.perf_counter()
    result = {"seed": setting.seed, **found}
    if found["gated"] is not False:
        result |= reinforce(setting, base, folder / "rl")
    ended = time.perf_counter()
    return result | {
        "pretraining_seconds": round(trained - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(ended - began, 1),
    }  # fmt: skip


def report(setting: Setting, folder: Path) -> int:
    """One seed, its JSON object as the last line; the exit status."""
    result = demonstrate(setting, folder)
    result.pop("curve", None)
    say(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}))
    return 1 if result["gated"] is False else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", action="store_true", help="the seeds of --seeds, each with its controls")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    options = parser.parse_args()
    if options.study:
        import study

        study.run_study(options.seeds)
        return
    with tempfile.TemporaryDirectory() as folder:
        status = report(Setting(seed=options.seed), Path(folder))
    sys.exit(status)


if __name__ == "__main__":
    main()
