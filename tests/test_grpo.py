"""Runs of GRPO on a model of bytes: what is logged, resumed, refused; that rewards teach it."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import save_model_of_bytes
from stops import stopped_at

import deepseek_jax as dsj
from deepseek_jax.data.tokenizer import byte_tokenizer
from deepseek_jax.infer.engine import Engine
from deepseek_jax.posttrain import grpo as room
from deepseek_jax.posttrain.common import Rate
from deepseek_jax.posttrain.grpo import NothingToLearn, grpo
from deepseek_jax.posttrain.grpo_config import GRPO
from deepseek_jax.posttrain.objective import PolicyLoss
from deepseek_jax.posttrain.prompts import ProblemFile
from deepseek_jax.posttrain.rewards import Accuracy, Custom, RewardsFailed
from deepseek_jax.posttrain.session import Session
from deepseek_jax.posttrain.tasks import RunningSum
from deepseek_jax.training.config import AdamW

TIMES = {
    "step_seconds", "rollout_seconds", "update_seconds", "rollout_share", "rollout_tokens_per_second",
    "update_tokens_per_second", "reward_seconds",
}  # fmt: skip


def ascii_share(problem, completion):
    """More ASCII among the characters, more reward: what is no character is U+FFFD."""
    return sum(c < "\x80" for c in completion) / max(len(completion), 1), {"characters": len(completion)}


def stepwise(problem, completion):
    """A step a character: 1 for ASCII."""
    scores = [float(c < "\x80") for c in completion]
    return sum(scores), {}, [(i + 1, score) for i, score in enumerate(scores)]


def nothing(problem, completion):
    return 0.5


def broken(problem, completion):
    raise OSError("the disk is full")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published checkpoint of a random model with bytes for tokens."""
    folder = tmp_path_factory.mktemp("base")
    save_model_of_bytes(folder, num_hidden_layers=2, vocab_size=259)
    return folder


def config_of(base, **fields):
    defaults = dict(
        init_from=str(base), template="none", problems=RunningSum(digits=3),
        rewards=(Custom(function="test_grpo:ascii_share", name="ascii"),),
        steps=4, rate=Rate(peak=3e-3), loss=PolicyLoss(kl=0.01), optimizer=AdamW(weight_decay=0.0), prompts=4, samples=4,
        max_prompt_tokens=4, max_new_tokens=6, slots=8, eval_problems=4, checkpoint_every=100, shown=2,
    )  # fmt: skip
    return GRPO(**(defaults | fields))


def same(line):
    return {name: value for name, value in line.items() if name not in TIMES}


def test_a_run_logs_what_it_should_and_is_a_run_folder(base, tmp_path):
    run = grpo(config_of(base, reference_every=2), tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert set(lines[0]) == {"step", "evaluation"} and lines[4]["evaluation"].keys() == lines[0]["evaluation"].keys()
    for line in lines[1:]:
        assert {
            "reward", "reward_std", "rewards", "length_mean", "length_min", "length_max", "length_ended", "truncated",
            "entropy", "kl", "clipped_low", "clipped_high", "zero_variance", "sampler_drift_mean", "sampler_drift_max",
            "rollout_tokens_per_second", "update_tokens_per_second", "rollout_share", "grad_norm", "reward_failures",
        } <= set(line)  # fmt: skip
        assert line["sampler_drift_max"] < 1e-5 and line["applied"] and line["rewards"]["ascii/characters"]["mean"] > 0
    assert lines[1]["kl"] == 0 and lines[2]["kl"] > 1e-7 > lines[3]["kl"]  # a new reference after the second step
    text = (tmp_path / "rollouts" / "step_000003.txt").read_text()
    assert text.count("=== step 3, completion") == 2 and "--- prompt\n" in text
    loaded = dsj.open_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"], run.state.params)
    assert loaded.template is None and "reward" in run.summary()


def test_rewards_teach(base, tmp_path):
    config = config_of(base, steps=15, rate=Rate(peak=1e-2), loss=PolicyLoss(kl=0.0), prompts=8, samples=8, slots=64)
    run = grpo(config, tmp_path, progress=False)
    rewards = [line["reward"] for line in run.metrics if "reward" in line]
    assert rewards[0] < 0.65 < 0.8 < rewards[-1]


def test_rewards_of_steps(base, tmp_path):
    """A token's advantage is the sum of the normalised rewards of the steps that end at or after it; one that makes no
    character whole shares what follows."""
    seen = []
    inner = room._Learner._packed

    def packed(self, completions, scores, advantages, length):
        seen.append((completions, scores, advantages))
        return inner(self, completions, scores, advantages, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room._Learner, "_packed", packed)
        config = config_of(base, steps=1, advantages="process", rewards=(Custom(function="test_grpo:stepwise"),))
        run = grpo(config, tmp_path, progress=False)
    [(completions, scores, advantages)] = seen
    for group in range(4):
        rows = range(4 * group, 4 * group + 4)
        all_scores = np.array([score for row in rows for _, score in scores.steps[row]])
        for row in rows:
            c, tokens = completions[row], completions[row].generation.tokens
            for j in range(len(tokens)):
                before = len(byte_tokenizer().decode(tokens[:j], skip_special=True).rstrip("\ufffd"))
                if not byte_tokenizer().decode(tokens[: j + 1], skip_special=True).isascii():
                    break  # where a character is not whole, which token ends it is the decoder's to say
                later = [s for end, s in scores.steps[row] if end > before]
                expected = sum((s - all_scores.mean()) / (all_scores.std() + 1e-6) for s in later)
                assert advantages[row, len(c.prompt) - 1 + j] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert run.metrics[1]["grad_norm"] > 0


@pytest.mark.parametrize("where", ["rollout", "between", "evaluation", "compilation"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(base, tmp_path, monkeypatch, where):
    """SIGTERM within a rollout, before an update, in an evaluation or a compilation: prompts, samples, updates and lines
    are the same as without it."""
    config = config_of(
        base, steps=4, updates=2, refills=1, eval_every=2, rate=Rate(peak=3e-3, shape="cosine", warmup_steps=2)
    )
    whole = grpo(config, tmp_path / "whole", progress=False)
    owner, name, call = {
        "rollout": (Engine, "step", 9), "between": (room._Learner, "_count_barren", 2),
        "evaluation": (room._Learner, "evaluate", 2), "compilation": (Session, "compiled", 1),
    }[where]  # fmt: skip
    step = stopped_at(monkeypatch, owner, name, call, lambda: grpo(config, tmp_path / "cut", progress=False))
    assert step == {"between": 1, "evaluation": 2, "compilation": 0}.get(where, step) < 4
    again = grpo(config, tmp_path / "cut", progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
    assert [same(line) for line in again.metrics] == [same(line) for line in whole.metrics]
    for path in (tmp_path / "whole" / "rollouts").iterdir():
        assert path.read_text() == (tmp_path / "cut" / "rollouts" / path.name).read_text()


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(base, tmp_path):
    """As a SIGKILL after step 3 leaves it: steps after the checkpoint are done again, to the bit."""
    config = config_of(base, steps=4, updates=2, refills=1, checkpoint_every=2, keep_checkpoints=3)
    whole = grpo(config, tmp_path, progress=False)
    before = jax.tree.map(np.asarray, whole.state)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:4], lines[4][:20]]))  # the last line was cut off
    again = grpo(config, tmp_path, progress=False)
    jax.tree.map(np.testing.assert_array_equal, again.state, before)
    assert [same(line) for line in again.metrics] == [same(line) for line in whole.metrics]


def test_problems_that_teach_nothing_end_the_run(base, tmp_path):
    config = config_of(
        base,
        steps=9,
        max_barren_steps=2,
        refills=2,
        rewards=(Custom(function="test_grpo:nothing"),),
        checkpoint_every=1,
    )
    with pytest.raises(NothingToLearn, match="2 steps in a row .* up to step 2"):
        grpo(config, tmp_path, progress=False)
    [_, line] = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["zero_variance"] == 1 and line["rounds"] == 3 and line["grad_norm"] == pytest.approx(0, abs=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dsj.open_model(tmp_path).variables))


def test_rewards_that_all_fail_end_the_run(base, tmp_path):
    with pytest.raises(RewardsFailed, match=r"'custom' could not be worked out for any .*OSError: the disk is full"):
        grpo(config_of(base, rewards=(Custom(function="test_grpo:broken"),)), tmp_path, progress=False)


@pytest.mark.parametrize(
    "how, said", [("zeroed", "leaves of the sampler are not the trainer's"), ("none", "has no weights")]
)
def test_a_sampler_with_other_weights_is_refused(base, tmp_path, monkeypatch, how, said):
    load = Engine.load
    seen = []

    def wrong(self, variables, **options):
        seen.append(1)
        if len(seen) < 3:
            load(self, variables, **options)
        elif how == "zeroed":
            load(self, jax.tree.map(np.zeros_like, variables), **options)

    monkeypatch.setattr(Engine, "load", wrong)
    with pytest.raises(ValueError, match=said):
        grpo(config_of(base), tmp_path, progress=False)


def test_a_run_does_not_go_on_as_another(base, tmp_path):
    config = config_of(base, steps=1)
    grpo(config, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"temperature: 1.0 in the checkpoint, 0.7 now"):
        grpo(replace(config, temperature=0.7, steps=2), tmp_path, progress=False)
    assert grpo(replace(config, steps=2, log_every=2), tmp_path, progress=False).metrics[-1]["step"] == 2


def test_problems_of_a_file_and_prompts_that_are_too_long(base, tmp_path):
    rows = [{"question": "a" * (3 + 40 * (i % 3 == 0)) + str(i), "gold": "b"} for i in range(60)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = ProblemFile(path=str(tmp_path / "problems.jsonl"), prompt="question", answer="gold")
    config = config_of(base, problems=problems, steps=1, max_prompt_tokens=8)
    run = grpo(config, tmp_path / "run", progress=False)
    assert run.metrics[1]["prompts_too_long"] > 0
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 2: \d+ prompts are longer"):
        grpo(replace(config, max_prompt_tokens=2), tmp_path / "short", progress=False)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(samples=1), "GRPO.samples = 1: must be at least 2"),
        (dict(prompts=3, updates=5), "GRPO.updates = 5: .* must divide prompts"),
        (dict(top_p=0.9), "GRPO.keep_sampling_mask = False: must be True with top_p"),
        (dict(temperature=0.0), "GRPO.temperature = 0.0: must be greater than 0"),
        (dict(reference_every=3, loss=PolicyLoss(kl=0.0)), "GRPO.reference_every = 3: .* needs loss.kl > 0"),
        (dict(loss=PolicyLoss(aggregation="dr_grpo", max_tokens=2)), "max_tokens must be at least max_new_tokens = 6"),
        (dict(max_new_tokens=1000), "GRPO.max_new_tokens = 1000: .* must not exceed the model's max_position"),
        (dict(init_from="absent"), "GRPO.init_from = 'absent' has neither manifest.json"),
        (dict(template="v9"), "v9"),
        (dict(template="v3"), "the tokenizer has no token"),
        (dict(rewards=(Accuracy(), Accuracy())), "two rewards are called 'accuracy'"),
        (dict(problems=ProblemFile(path="absent.jsonl")), "absent.jsonl"),
    ],
)
def test_what_cannot_run_is_refused_before_it_begins(base, tmp_path, fields, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        grpo(config_of(base, **fields), tmp_path, progress=False)
    assert not (tmp_path / "metrics.jsonl").exists()
