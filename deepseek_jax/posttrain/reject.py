"""Rejection sampling: answers of a model to problems, of which the good ones become data (R1, section 2.3.3).

R1 kept what its rules or a judge called correct, and left out thoughts in several languages, with long paragraphs or with
blocks of code. What is kept is a file of conversations that `dsj.sft` reads.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepseek_jax import storage
from deepseek_jax.chat.rows import Conversation, LeftOut, encode_conversation
from deepseek_jax.parallel.mesh import make_mesh, use_mesh
from deepseek_jax.posttrain.begin import open_start
from deepseek_jax.posttrain.common import From
from deepseek_jax.posttrain.prompts import Mix, ProblemFile, Problems, Prompter
from deepseek_jax.posttrain.reward_model import open_reward_model
from deepseek_jax.posttrain.rewards import THINK, RewardKind, Scores, check_parts, language_share, open_rewards
from deepseek_jax.posttrain.sampler import Completion, Sampler
from deepseek_jax.posttrain.tasks import ChainSum, Countdown, ReasoningGym, RunningSum
from deepseek_jax.serialize import check_types, to_dict
from deepseek_jax.training.interrupt import Interrupt, Stopped

SAMPLES, REPORT = "samples.jsonl", "report.json"
_FREE = ("mesh", "slots", "reward_workers", "verify_checkpoints")  # may change when sampling goes on


@dataclass(frozen=True, kw_only=True)
class Rejection(From):
    """Sample, score, filter, and keep what is left as conversations."""

    problems: RunningSum | ChainSum | Countdown | ReasoningGym | ProblemFile | Mix
    rewards: tuple[RewardKind, ...]
    count: int
    """Problems of the train split that are asked."""
    samples: int = 4
    """Answers to each."""
    at_least: float = 1.0
    """The total reward from which an answer is kept."""
    keep: int = 1
    """Answers to one problem that are kept, at most: the shortest."""
    max_prompt_tokens: int = 512
    max_new_tokens: int = 1024
    temperature: float = 0.6
    top_p: float = 0.95
    language: str | None = None
    """"en" or "zh": answers whose thoughts have words of others are left out."""
    longest_paragraph: int | None = None
    """Characters of a paragraph of thoughts; answers with a longer one are left out."""
    code: bool = True
    """Whether thoughts may hold blocks of code."""
    exact: bool = True
    """Leave out what the template, given thoughts and answer apart, would write otherwise than the model did."""
    ended: bool = True
    """Whether answers that were cut off at `max_new_tokens` are left out."""
    slots: int = 64
    block: int = 64
    """Problems whose answers are written at once: what a stop can lose."""
    reward_workers: int = 2
    allow_unsafe_code: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("count", "samples", "keep", "max_prompt_tokens", "max_new_tokens", "slots", "block"):
            self.check(getattr(self, name) > 0, name, "must be greater than 0")
        self.check(self.language in (None, "en", "zh"), "language", "must be 'en' or 'zh', or None")
        check_parts(self.rewards, self.problems)
        self.check(self.temperature > 0 or self.samples == 1, "samples", "must be 1 at temperature 0: all are alike")


@dataclass(frozen=True)
class Rejected:
    """A finished call of `reject`."""

    folder: Any
    samples: Any
    """The file of conversations."""
    report: dict[str, Any]
    """Counts: problems, answers, kept, and the answers left out by reason."""

    def summary(self) -> str:
        """What it came to, for a person to read."""
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.report["left_out"].items()) or "none"
        return (
            f"{self.report['kept']} of {self.report['answers']} answers kept (yield {self.report['yield']:.1%}), for "
            f"{self.report['problems_kept']} of {self.report['problems']} problems; left out: {left_out}\n{self.samples}"
        )


def reject(config: Rejection, folder: storage.AnyPath, *, progress: bool = True) -> Rejected:
    """Makes folder/samples.jsonl (a conversation a line, with its problem's answer and reward) and folder/report.json.

    A call on a folder whose file is whole returns at once; one that was stopped goes on behind the last whole block.

    Raises:
        ValueError: what cannot be run; a folder that was begun with another configuration; nothing was kept.
        Stopped: a signal came; whole blocks are kept.
        RewardsFailed: a reward could be worked out for no answer of a block.
    """
    check_types(config)
    folder = storage.path(folder)
    wanted = {name: value for name, value in to_dict(config).items() if name not in _FREE}
    mesh = make_mesh(config.mesh)
    with storage.RunLock(folder), Interrupt() as interrupt, use_mesh(mesh):
        note = folder / "config.json.part"  # not config.json: a folder with that is a published checkpoint
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) != wanted:
            raise ValueError(f"{folder} was begun with another configuration: start a new folder")
        if (folder / REPORT).exists():
            return Rejected(folder, folder / SAMPLES, json.loads((folder / REPORT).read_text(encoding="utf-8")))
        start = open_start(config, mesh)
        prompter = Prompter.of(start.tokenizer, start.template)
        problems = Problems(config.problems, "train", config.seed)
        sampler = Sampler(
            start.model, prompter, max_prompt_tokens=config.max_prompt_tokens, max_new_tokens=config.max_new_tokens,
            slots=min(config.slots, config.count * config.samples),
        )  # fmt: skip
        storage.write_atomic(note, json.dumps(wanted, indent=2) + "\n")
        blocks = range(0, config.count, config.block)
        with open_rewards(
            config.rewards, allow_unsafe_code=config.allow_unsafe_code, workers=config.reward_workers,
            open_model=lambda path: open_reward_model(path, mesh=mesh),
        ) as scorer:  # fmt: skip
            loaded = False
            interrupt.deferred = True

            def beat() -> None:
                if interrupt.check(0):
                    raise Stopped(f"{interrupt.requested}: stopped; whole blocks are kept, the same call goes on")

            for first in blocks:
                count = min(config.block, config.count - first)
                part = folder / "parts" / f"{first:08}.json"
                asked, skipped = sampler.draw(problems, count)  # also of finished blocks: the position goes on
                if part.exists():
                    continue
                if not loaded:
                    sampler.load(start.load())
                    loaded = True
                began = time.perf_counter()
                completions = sampler.complete(
                    asked, config.samples, f"{config.seed}/reject/{first}", temperature=config.temperature,
                    top_p=config.top_p, beat=beat,
                )  # fmt: skip
                scores = scorer.score([c.item(i // config.samples) for i, c in enumerate(completions)])
                rows, left_out = _kept(config, prompter, completions, scores)
                seconds = time.perf_counter() - began
                facts = {"rows": rows, "left_out": left_out, "too_long": skipped, "seconds": seconds}
                storage.write_atomic(part, json.dumps(facts, ensure_ascii=False))
                beat()
                if progress:
                    print(
                        f"rejection sampling: {first + count} of {config.count} problems, {len(rows)} kept of the last"
                    )
        return _whole(config, folder, [folder / "parts" / f"{first:08}.json" for first in blocks])


def _whole(config: Rejection, folder: Any, parts: Sequence[Any]) -> Rejected:
    """Joins the blocks, without answers that another problem has already given word for word."""
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    answers: Counter[str] = Counter()  # of each question: a file that ends begins anew
    too_long, seconds = 0, 0.0
    for part in parts:
        facts = json.loads(part.read_text(encoding="utf-8"))
        left_out.update(facts["left_out"])
        too_long, seconds = too_long + facts["too_long"], seconds + facts["seconds"]
        for row in facts["rows"]:
            key = json.dumps(row["messages"], ensure_ascii=False)
            question = row["messages"][0]["content"]
            if key in seen:
                left_out["duplicate"] += 1
            elif answers[question] == config.keep:
                left_out["more than are kept"] += 1
            else:
                rows.append(row)
                answers[question] += 1
            seen.add(key)
    report = {
        "problems": config.count, "answers": config.count * config.samples, "kept": len(rows),
        "yield": len(rows) / (config.count * config.samples),
        "problems_kept": len({row["messages"][0]["content"] for row in rows}),
        "left_out": {reason: count for reason, count in sorted(left_out.items()) if count},
        "prompts_too_long": too_long, "seconds": seconds,
    }  # fmt: skip
    if not rows:
        raise ValueError(f"{folder}: no answer was kept: {report['left_out']}; ask a better model, or ask for less")
    storage.write_atomic(folder / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    storage.write_atomic(folder / REPORT, json.dumps(report, indent=2) + "\n")
    return Rejected(folder, folder / SAMPLES, report)


def _kept(
    config: Rejection, prompter: Prompter, completions: Sequence[Completion], scores: Scores
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the answers that are kept, at most `keep` a problem, and how many were left out by reason."""
    left_out: Counter[str] = Counter()
    rows = []
    for first in range(0, len(completions), config.samples):
        good: list[tuple[int, int]] = []
        for i in range(first, first + config.samples):
            reason = _wrong(config, completions[i], float(scores.total[i]), bool(scores.failed[i]))
            if reason is None:
                good.append((len(completions[i].generation.tokens), i))
            else:
                left_out[reason] += 1
        new: dict[str, dict[str, Any]] = {}  # by what they say, the shortest first
        for _, i in sorted(good):
            row = _row(prompter, completions[i], float(scores.total[i]))
            if config.exact and not _as_written(prompter, completions[i], row):
                left_out["written otherwise by the template"] += 1
            elif json.dumps(row["messages"]) in new:
                left_out["duplicate"] += 1
            else:
                new[json.dumps(row["messages"])] = row
        left_out["more than are kept"] += max(len(new) - config.keep, 0)
        rows += list(new.values())[: config.keep]
    return rows, dict(left_out)


def _as_written(prompter: Prompter, completion: Completion, row: dict[str, Any]) -> bool:
    """Whether fine-tuning on the row reads the prompt and the very text of its completion, special tokens included."""
    if prompter.template is None:
        return True
    tokenizer, before = prompter.tokenizer, len(completion.prompt)
    conversation = Conversation([dict(message) for message in row["messages"]], None)
    try:
        ids = encode_conversation(conversation, prompter.template, tokenizer).ids
        said = tokenizer.decode(completion.generation.tokens)
    except (LeftOut, ValueError):  # ids that the tokenizer does not have, among others
        return False
    return ids[:before] == completion.prompt and tokenizer.decode(ids[before:]).startswith(said)


def _wrong(config: Rejection, completion: Completion, score: float, failed: bool) -> str | None:
    """Why an answer is left out, or None."""
    thoughts = completion.text.split(THINK[1])[0].lstrip().removeprefix(THINK[0])
    if failed:
        return "reward failed"
    if config.ended and completion.truncated:
        return "cut off"
    if score < config.at_least - 1e-9:  # a sum of weights
        return "reward too low"
    if not config.code and "```" in thoughts:
        return "code"
    if config.longest_paragraph is not None and max(map(len, thoughts.split("\n\n"))) > config.longest_paragraph:
        return "long paragraph"
    # Thoughts without a word, such as sums alone, mix no languages.
    words = any(c.isalpha() for c in thoughts)
    if config.language is not None and words and language_share(thoughts, config.language) < 1:
        return "mixed languages"
    return None


def _row(prompter: Prompter, completion: Completion, score: float) -> dict[str, Any]:
    """A conversation in OpenAI's form, thoughts apart where the template has a place for them."""
    text = completion.text.removeprefix(prompter.opened)
    answer: dict[str, Any] = {"role": "assistant", "content": text}
    if prompter.template is not None:
        parsed = prompter.template.parse(text, thinking=prompter.template.thinks != "never")
        answer["content"] = parsed.content
        if parsed.reasoning is not None:
            answer["reasoning_content"] = parsed.reasoning
    problem = completion.problem
    return {
        "messages": [{"role": "user", "content": problem.prompt}, answer],
        "answer": problem.answer, "reward": score, "source": problem.source,
    }  # fmt: skip
