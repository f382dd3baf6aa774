"""All stages of R1 and a student, at micro size; rejection sampling; rewards for parts of a mixture."""

import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from chat_tokenizer import CHAT_TOKENS, chat_tokenizer
from helpers import micro, random_variables

import deepseek_jax as dsj
import deepseek_jax.chat
from deepseek_jax.chat.data import ChatData, ChatJsonl
from deepseek_jax.infer.engine import Engine
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.distill_config import Distill, OnPolicy, Teacher
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prefer import Prefer
from deepseek_jax.posttrain.preference_data import PairFile
from deepseek_jax.posttrain.prompts import Mix, Part, ProblemFile, Problems, Prompter
from deepseek_jax.posttrain.r1 import R1, Stage, r1
from deepseek_jax.posttrain.reject import Rejection, reject
from deepseek_jax.posttrain.reject import _kept as kept_of
from deepseek_jax.posttrain.reject import _wrong as wrong
from deepseek_jax.posttrain.reward_model import RewardModel
from deepseek_jax.posttrain.rewards import Accuracy, Custom, Item, Language, ModelReward, Only, Scores, open_rewards
from deepseek_jax.posttrain.sampler import Completion
from deepseek_jax.posttrain.sft import SFT
from deepseek_jax.posttrain.tasks import ChainSum, Problem, RunningSum
from deepseek_jax.training import Stopped

ASCII = Custom(function="test_r1:ascii_share", name="ascii")
SIZES = dict(max_prompt_tokens=24, max_new_tokens=8)


def ascii_share(problem, completion):
    return sum(c < "\x80" for c in completion) / max(len(completion), 1)


def save(folder, layers, seed):
    """A random model of bytes with the tokens of chat templates, as a published checkpoint."""
    tokenizer = chat_tokenizer(CHAT_TOKENS[:4])
    config = micro("llm-gqa", num_hidden_layers=layers, vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=1)
    dsj.save_hf(folder, dsj.DeepSeek(config), random_variables(config, seed, scale=0.05))
    tokenizer.save(folder / "tokenizer.json")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, a smaller student's, pairs of answers, and a general question's file."""
    folder = tmp_path_factory.mktemp("r1")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(16):
            file.write(json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "\u00e4\u00f6"}) + "\n")
    with (folder / "general.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"prompt": f"say {i}", "answer": ""}) + "\n")
    return {
        "base": save(folder / "base", 2, 0), "student": save(folder / "student", 1, 1),
        "pairs": str(folder / "pairs.jsonl"), "general": str(folder / "general.jsonl"),
    }  # fmt: skip


def stages(folders):
    """R1's, then its student by samples and by probabilities."""
    rl = dict(
        template="r1", steps=2, rate=Rate(peak=1e-3), loss=PolicyLoss(kl=0.001, clip_high=10.0), prompts=2, samples=4,
        slots=8, eval_problems=4, shown=1, **SIZES,
    )  # fmt: skip
    tune = dict(
        template="r1", steps=2, batch_size=8, seq_len=64, rate=Rate(peak=1e-3, shape="cosine"), eval_sequences=2
    )
    sample = dict(
        template="r1",
        problems=RunningSum(digits=3),
        rewards=(ASCII,),
        count=8,
        samples=2,
        at_least=0.05,
        ended=False,
        **SIZES,
    )

    def chats(stage):
        return ChatData(sources=(ChatJsonl(path=f"@{stage}/samples.jsonl"),), held_out_fraction=0.2)

    def learned(name, run):
        return Stage(name=name, run=run)

    scenarios = Mix(
        parts=(
            Part(name="sums", problems=ChainSum(terms=2, digits=1), weight=2.0),
            Part(name="talk", problems=ProblemFile(path=folders["general"])),
        )
    )
    judged = (
        Only(reward=Accuracy(), parts=("sums",)), Only(reward=ModelReward(path="@helpful"), parts=("talk",)), ASCII,
    )  # fmt: skip
    easy = RunningSum(digits=3)
    return R1(
        stages=(
            learned("zero", GRPO(init_from=folders["base"], problems=easy, rewards=(ASCII,), **rl)),
            learned("cold", Rejection(init_from="@zero", **sample)),
            learned("cold-start", SFT(init_from=folders["base"], data=chats("cold"), **tune)),
            learned(
                "reasoning",
                GRPO(init_from="@cold-start", problems=easy, rewards=(ASCII, Language(language="en")), **rl),
            ),
            learned("sampling", Rejection(init_from="@reasoning", **sample)),
            learned("tuned", SFT(init_from=folders["base"], data=chats("sampling"), **tune)),
            learned(
                "helpful",
                Prefer(
                    init_from="@tuned", data=PairFile(path=folders["pairs"]), learn=RewardModel(), batch_size=8,
                    max_tokens=32, steps=2, rate=Rate(peak=1e-3), held_out_fraction=0.2,
                ),
            ),
            learned("all-scenarios", GRPO(init_from="@tuned", problems=scenarios, rewards=judged, **rl)),
            learned("student", SFT(init_from=folders["student"], data=chats("sampling"), **tune)),
            learned(
                "on-policy",
                Distill(
                    init_from="@student", template="r1", teachers=(Teacher(path="@all-scenarios"),), steps=2,
                    rate=Rate(peak=1e-3),
                    method=OnPolicy(problems=easy, prompts=2, samples=4, slots=8, eval_problems=4, **SIZES),
                ),
            ),
        )
    )  # fmt: skip


def test_the_stages_of_r1_and_a_student(folders, tmp_path, monkeypatch, capsys):
    """Cut off in the second reinforcement learning, and gone on with: what is done is not done again."""
    config, calls = stages(folders), []
    inner = Engine.step

    def interrupted(self):
        calls.append(1)
        if (tmp_path / "cold-start" / "stage.json").exists() and len(calls) > 1 and not cut:
            cut.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self)

    cut: list[int] = []
    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(Stopped) as stopped:
        r1(config, tmp_path, progress=False)
    if stopped.value.thread is not None:
        stopped.value.thread.join()
    monkeypatch.undo()
    before = {name: (tmp_path / name / "stage.json").stat().st_mtime_ns for name in ("zero", "cold", "cold-start")}
    assert not (tmp_path / "reasoning" / "stage.json").exists()
    pipeline = r1(config, tmp_path, progress=False)
    assert before == {name: (tmp_path / name / "stage.json").stat().st_mtime_ns for name in before}
    assert list(pipeline.reports) == [stage.name for stage in config.stages]
    assert pipeline.reports["cold"]["figures"]["kept"] > 0 and "all-scenarios" in pipeline.summary()
    line = json.loads((tmp_path / "all-scenarios" / "metrics.jsonl").read_text().splitlines()[1])
    assert {"accuracy", "model", "ascii"} <= set(line["rewards"])
    rows = [json.loads(line) for line in (tmp_path / "sampling" / "samples.jsonl").read_text().splitlines()]
    assert all(row["messages"][0]["role"] == "user" and row["reward"] >= 0.05 for row in rows)
    for name in ("zero", "cold-start", "reasoning", "tuned", "all-scenarios", "student", "on-policy"):
        loaded = dsj.open_model(tmp_path / name)
        assert loaded.template.name == "r1"
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(loaded.variables))
    changed = replace(
        config, stages=(replace(config.stages[0], run=replace(config.stages[0].run, steps=3)), *config.stages[1:])
    )
    with pytest.raises(ValueError, match=r"R1.stages\[0\] = 'zero' is done in .*, with another steps"):
        r1(changed, tmp_path, progress=False)


def test_stages_that_do_not_fit_are_refused(folders):
    config = stages(folders)
    zero, cold = config.stages[:2]
    with pytest.raises(ValueError, match="names no stage before 'cold'"):
        R1(stages=(cold, zero))
    with pytest.raises(ValueError, match="must have names that differ"):
        R1(stages=(zero, zero))
    with pytest.raises(ValueError, match=r"Stage.name = 'a b'"):
        replace(zero, name="a b")


def test_rejection_keeps_the_good_and_goes_on(folders, tmp_path, monkeypatch):
    """A stop between blocks loses nothing: the same file as without it."""
    config = Rejection(
        init_from=folders["base"], template="r1", problems=RunningSum(digits=3), rewards=(ASCII,), count=6, samples=3,
        at_least=0.3, keep=2, block=2, slots=6, ended=False, exact=False, **SIZES,
    )  # fmt: skip
    whole = reject(config, tmp_path / "whole", progress=False)
    rows = [json.loads(line) for line in whole.samples.read_text().splitlines()]
    assert whole.report["answers"] == 18 and whole.report["kept"] == len(rows) > 0
    assert sum(whole.report["left_out"].values()) + len(rows) == 18
    assert all(row["reward"] >= 0.3 for row in rows)
    (tmp_path / "cut" / "parts").mkdir(parents=True)
    for name in ("config.json.part", "parts/00000000.json"):
        (tmp_path / "cut" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    assert reject(config, tmp_path / "cut", progress=False).samples.read_text() == whole.samples.read_text()
    with pytest.raises(ValueError, match="begun with another configuration"):
        reject(replace(config, keep=1), tmp_path / "cut", progress=False)
    with pytest.raises(ValueError, match="no answer was kept"):
        reject(replace(config, at_least=2.0), tmp_path / "none", progress=False)


@pytest.mark.parametrize(
    "template, text, kept",
    [
        ("llm", " 2", True), ("llm", "2", False), ("r1", "a\n</think>\n\n2", True), ("r1", "a</think>2", False),
        ("r1", "</think>2", False), ("v3", "2", True), ("r1-zero", " <think> a </think> <answer> 2 </answer>", True),
        ("r1-zero", " so 2", True), ("r1-zero", "<think>a</think><answer>2</answer>", False),
    ],
)  # fmt: skip
def test_what_the_template_would_write_otherwise_is_left_out(template, text, kept):
    """What is kept is trained as the model wrote it: prompt, every character, and the end."""
    tokenizer = chat_tokenizer()
    prompter = Prompter.of(tokenizer, dsj.chat.get_template(template))
    tokens = [*tokenizer.encode(text, special=True), tokenizer.eos_id]
    problem = Problem(prompt="1+1", answer="2")
    generation = dsj.Generation(tokens=tokens, finish_reason="stop")
    completion = Completion(problem, prompter.ids(problem.prompt), generation, prompter.text(tokens))
    config = Rejection(init_from="x", problems=RunningSum(), rewards=(ASCII,), count=1, samples=1, at_least=0.0)
    scores = Scores(total=np.ones(1), parts={}, failed=np.zeros(1, bool), failures={}, steps=[()])
    rows, left_out = kept_of(config, prompter, [completion], scores)
    assert len(rows) == kept and left_out.get("written otherwise by the template", 0) == (not kept)


def test_filters_look_at_thoughts_alone(folders):
    tokenizer = chat_tokenizer()
    config = Rejection(
        init_from="x", problems=RunningSum(), rewards=(ASCII,), count=1, language="en", code=False, longest_paragraph=9
    )

    def reason(text):
        generation = dsj.Generation(tokens=[5], finish_reason="stop")
        return wrong(config, Completion(Problem(prompt="", answer=""), [1], generation, text), 1.0, False)

    assert tokenizer and reason("<think>\n1+1=2\n</think>\n\n```python\nprint(2 + 2 + 2)\n```") is None
    assert reason("<think>\nwir\n\n\u6211\n</think>2") == "mixed languages"
    assert reason("<think>```x```</think>2") == "code" and reason("<think>aaaaaaaaaaaaaaa</think>2") == "long paragraph"


def test_rewards_for_parts_that_are_not_there_are_refused(folders):
    only = (Only(reward=Accuracy(), parts=("maths",)),)
    with pytest.raises(ValueError, match=r"Only.parts = \['maths'\]: must be names of parts of the problems: \[\]"):
        Rejection(init_from="x", problems=RunningSum(), rewards=only, count=1)


def test_mixtures_and_rewards_for_their_parts(folders):
    mix = Mix(parts=(Part(name="a", problems=RunningSum(digits=3), weight=3.0), Part(name="b", problems=ChainSum())))
    problems = Problems(mix, "train", 0).take(40)
    assert [p.source for p in problems].count("a") == 30
    assert [p.prompt for p in problems if p.source == "b"][:3] == [
        p.prompt for p in Problems(ChainSum(), "train", 0).take(3)
    ]
    with pytest.raises(ValueError, match="Mix.parts"):
        Mix(parts=())
    items = [
        Item(problem=Problem(prompt="?", answer="1", source=part), completion="\\boxed{1}", tokens=1, truncated=False)
        for part in ("a", "b")
    ]
    rewards = (Only(reward=Accuracy(), parts=("a",)), Only(reward=Accuracy(name="other", weight=0.5), parts=("b",)))
    with open_rewards(rewards) as scorer:
        assert scorer.score(items).total.tolist() == [1.0, 0.5]
