"""Rewards are added up by weight; one that cannot be worked out counts as 0, marks its item, and is told."""

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.posttrain.rewards import (
    Accuracy,
    Code,
    Custom,
    Format,
    Item,
    Judge,
    Language,
    Length,
    ModelReward,
    Overlong,
    RewardsFailed,
    open_rewards,
)
from deepseek_jax.posttrain.tasks import Problem
from deepseek_jax.training.interrupt import Stopped

TAGGED = "<think>two and two</think><answer>{}</answer>"


def items(*completions, answer="4", tokens=10, prompt="2 + 2?"):
    problem = Problem(prompt=prompt, answer=answer)
    return [Item(problem=problem, completion=c, tokens=tokens, truncated=False) for c in completions]


def custom(monkeypatch, function):
    """A reward of a function, which is what the module `tests_own_reward` has."""
    monkeypatch.setitem(__import__("sys").modules, "tests_own_reward", SimpleNamespace(reward=function))
    return Custom(function="tests_own_reward:reward")


def test_rewards_are_added_up_by_weight():
    kinds = [Accuracy(weight=2.0), Format(weight=0.5), Language(name="english"), Overlong(limit=20, buffer=20)]
    with open_rewards(kinds) as scorer:
        scores = scorer.score(items(TAGGED.format(4), TAGGED.format(5), "4"))
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        "accuracy": [1, 0, 0], "format": [1, 1, 0], "english": [1, 1, 0], "overlong": [-0.5, -0.5, -0.5],
    }  # fmt: skip
    assert scores.total.tolist() == [3.0, 1.0, -0.5] and scores.total.dtype == np.float64
    assert not scores.failed.any() and scores.failed.dtype == bool and scores.failures == {}


def test_no_items_have_no_scores():
    with open_rewards([Accuracy(), Length()]) as scorer:
        scores = scorer.score([])
    assert scores.total.shape == scores.failed.shape == scores.parts["accuracy"].shape == (0,)


@pytest.mark.parametrize(
    "completion",
    [
        "", "<answer></answer>", TAGGED.format("3</answer><answer>4"), TAGGED.format("4") + TAGGED.format("4"),
        TAGGED.format("14"), TAGGED.format("4 or 5"), TAGGED.format("9**9**9"), TAGGED.format("٤"), TAGGED.format("⁴"),
        "<think><think><answer>4</answer></think></think>", "<think><answer>4</answer>", "4",
    ],
)  # fmt: skip
def test_abuses_score_nothing(completion):
    """An answer tag in the prompt is nobody's answer."""
    with open_rewards([Accuracy(), Format(weight=0)]) as scorer:
        scores = scorer.score(items(completion, prompt="2 + 2? Write <answer>4</answer>"))
    assert scores.total.tolist() == [0] and not scores.failed.any()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (lambda: 1 / 0, "custom: ZeroDivisionError: division by zero"),
        (lambda: math.nan, "custom: a reward of nan: rewards must be finite"),
        (lambda: -math.inf, "custom: a reward of -inf: rewards must be finite"),
        (lambda: (1.0, {"part": math.inf}), "custom: a reward of inf: rewards must be finite"),
        (lambda: None, "custom: TypeError: float() argument must be a string or a real number, not 'NoneType'"),
    ],
    ids=["raises", "nan", "inf", "part", "none"],
)
def test_a_reward_that_fails_is_counted(monkeypatch, bad, reason):
    kind = custom(monkeypatch, lambda problem, text: bad() if text == "bad" else (3.0, {"length": len(text)}))
    with open_rewards([kind, Accuracy()]) as scorer:
        scores = scorer.score(items("bad", "good", "bad", TAGGED.format(4)))
        assert scores.failures == {reason: 2}
        assert scores.failed.tolist() == [True, False, True, False]
        assert scores.total.tolist() == [0, 3, 0, 4]
        assert scores.parts["custom/length"].tolist() == [0, 4, 0, len(TAGGED.format(4))]
        with pytest.raises(RewardsFailed, match="the reward 'custom' could not be worked out for any of 2") as told:
            scorer.score(items("bad", "bad"))
    assert reason in str(told.value) and told.value.exit_code == 69 and not isinstance(told.value, ValueError)


def test_a_signal_is_no_failure_of_a_reward(monkeypatch):
    def interrupted(problem, text):
        raise Stopped("SIGTERM")

    with open_rewards([custom(monkeypatch, interrupted)]) as scorer, pytest.raises(Stopped):
        scorer.score(items("a"))


def test_a_model_is_opened_asked_and_closed():
    asked, closed = [], []

    class Model:
        def __call__(self, some):
            asked.append(some)
            return [len(item.completion) for item in some]

        def close(self):
            closed.append(True)

    opened = {"runs/rm": Model()}
    batch = items("a", "bcd")
    with open_rewards([ModelReward(path="runs/rm")], open_model=opened.__getitem__) as scorer:
        assert scorer.score(batch).parts["model"].tolist() == [1, 3] and asked == [batch] and not closed
    assert closed
    with pytest.raises(KeyError), open_rewards([ModelReward(path="runs/rm")], open_model=opened.__getitem__):
        raise KeyError("something in the run")
    assert len(closed) == 2
    with (
        open_rewards([ModelReward(path="x")], open_model=lambda path: lambda some: [1.0]) as scorer,
        pytest.raises(RewardsFailed, match="1 scores for 2 completions"),
    ):
        scorer.score(batch)
    with pytest.raises(ValueError, match="ModelReward.path = 'x'"), open_rewards([ModelReward(path="x")]):
        pass


def test_length_is_compared_within_groups():
    """Kimi k1.5: shortest 0.5, longest −0.5, wrong answers never above 0."""
    right, wrong = TAGGED.format(4), TAGGED.format(5)
    batch = [
        Item(problem=Problem(prompt="", answer="4"), completion=text, tokens=tokens, truncated=False, group=group)
        for text, tokens, group in [
            (right, 10, 0), (right, 20, 0), (wrong, 10, 0), (wrong, 30, 0), (right, 500, 1), (right, 500, 1)
        ]
    ]  # fmt: skip
    with open_rewards([Length(weight=2), Accuracy()]) as scorer:
        scores = scorer.score(batch)
    assert scores.parts["length"].tolist() == [0.5, 0, 0, -0.5, 0, 0]
    assert scores.total.tolist() == [2, 1, 0, -1, 1, 1]


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (lambda: [Accuracy(weight=math.nan)], "Accuracy.weight = nan: must be finite"),
        (lambda: [Accuracy(verifier="latex")], "Accuracy.verifier = 'latex': must be one of exact, math"),  # type: ignore
        (lambda: [Language(language="fr")], "Language.language = 'fr'"),  # type: ignore
        (lambda: [Overlong(limit=10, buffer=11)], "Overlong.buffer = 11: must be in .0, limit = 10"),
        (lambda: [Code(seconds=0)], "Code.seconds = 0: must be greater than 0"),
        (lambda: [Judge(base_url="localhost", model="m")], "Judge.base_url = 'localhost': must begin with http"),
        (lambda: [Judge(base_url="http://x", model="m", scale=(1, 1))], "Judge.scale"),
        (lambda: [Judge(base_url="http://x", model="m", prompt="{prompt}")], "Judge.prompt = '{prompt}': must have"),
        (lambda: [Judge(base_url="http://x", model="m", prompt="{completion.x}")], "Judge.prompt"),
        (lambda: [Judge(base_url="http://x", model="m", prompt="{")], "Judge.prompt: .*: write a brace"),
        (lambda: [Custom(function="somewhere")], "Custom.function = 'somewhere': must be 'package.module:function'"),
        (lambda: [Custom(function="no.such:f")], "Custom.function = 'no.such:f': No module named 'no'"),
        (lambda: [Custom(function="math:no")], "Custom.function = 'math:no': the module math has no function no"),
        (lambda: [Accuracy(), Accuracy()], "Accuracy.name = None: two rewards are called 'accuracy'"),
        (lambda: [Length(of="exactness"), Accuracy()], "Length.of = 'exactness': must be one of the other rewards"),
        (list, "open_rewards.kinds"),
    ],
)
def test_what_cannot_be_a_reward(kinds, message):
    with pytest.raises(ValueError, match=message), open_rewards(kinds()):
        pass


def test_rules_are_quick_on_huge_completions():
    begin = time.monotonic()
    with open_rewards([Accuracy(), Format(), Language()]) as scorer:
        scores = scorer.score(items("<answer>" * 100_000, "<think>" * 100_000, "9" * 1_000_000))
    assert scores.parts["accuracy"].tolist() == scores.parts["format"].tolist() == [0, 0, 0]
    assert time.monotonic() - begin < 10
