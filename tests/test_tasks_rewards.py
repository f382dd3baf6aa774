"""Tasks are functions of seed and number; rules reward right answers, and nothing that only looks like one."""

import json

import pytest

from deepseek_jax.posttrain import rewards
from deepseek_jax.posttrain.tasks import (
    ChainSum,
    Countdown,
    Problem,
    ReasoningGym,
    RunningSum,
    problem,
    problems,
    read_problems,
    split_of,
)

TASKS = (RunningSum(digits=5), ChainSum(terms=3), Countdown())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_problems_follow_from_seed_and_number(task):
    train, test = (list(problems(task, split, 60, seed=3)) for split in ("train", "test"))
    assert train == list(problems(task, "train", 60, seed=3)) and train[7] == problem(task, "train", 7, seed=3)
    assert train != list(problems(task, "train", 60, seed=4))
    assert not {p.prompt for p in train} & {p.prompt for p in problems(task, "test", 60, seed=9)}
    assert {split_of(p.prompt) for p in test} == {"test"}


def test_answers_are_right():
    for p in problems(RunningSum(digits=6), "train", 50):
        digits = [int(c) for c in p.prompt]
        assert p.answer == str(sum(digits) % 10)
        assert p.steps == "".join(str(sum(digits[:i]) % 10) for i in range(1, 6))
    for p in problems(ChainSum(), "train", 50):
        expression = p.prompt.removeprefix("What is ").removesuffix("?")
        assert eval(expression) == int(p.answer)  # our own text
    for p in problems(Countdown(numbers=4), "train", 50):
        assert rewards.countdown(p, f"<think>x</think><answer>{p.answer}</answer>") == 1


def test_a_task_with_too_few_problems_says_so():
    class One:
        def draw(self, rng):
            return Problem(prompt="always", answer="1")

    other = "test" if split_of("always") == "train" else "train"
    with pytest.raises(ValueError, match="too few different problems"):
        problem(One(), other, 0)
    with pytest.raises(ValueError, match=r"RunningSum.digits = 1: must be at least 2"):
        RunningSum(digits=1)


def test_reasoning_gym_by_name():
    pytest.importorskip("reasoning_gym", reason="the extra `tasks`")
    task = ReasoningGym(name="chain_sum")
    assert problem(task, "train", 4, seed=1) == problem(task, "train", 4, seed=1)
    with pytest.raises(ValueError, match="ReasoningGym.name = 'absent'"):
        problem(ReasoningGym(name="absent"), "train", 0)


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "1+1", "answer": 2}) + "\n\n")
    assert read_problems(path) == [Problem(prompt="1+1", answer="2")]
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="line 1: no field answer"):
        read_problems(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="line 1"):
        read_problems(path)


TAGGED = "<think>2 + 2</think>\n<answer>{}</answer>"


@pytest.mark.parametrize(
    "text, good",
    [
        (TAGGED.format("4"), True),
        ("  " + TAGGED.format("4") + "\n", True),
        ("<think></think><answer>4</answer>", False),
        ("<think>  </think><answer>4</answer>", False),
        ("<think>a</think><answer></answer>", False),
        ("<answer>4</answer><think>a</think>", False),
        ("<think>a</think><answer>4</answer><answer>5</answer>", False),
        ("<think><think>a</think></think><answer>4</answer>", False),
        ("<think>a</think>so<answer>4</answer>", False),
        ("<think>a</think><answer>4</answer> and more", False),
        ("<think>a<answer>4</answer></think>", False),
    ],
)
def test_format(text, good):
    assert rewards.has_format(text) == good


@pytest.mark.parametrize(
    "text, score",
    [
        (TAGGED.format("42"), 1), (TAGGED.format(" 42.0 "), 1), (TAGGED.format("84/2"), 1), ("so \\boxed{42}", 1),
        ("\\boxed{1} or \\boxed{42}", 1), ("<think>\\boxed{7}</think> \\boxed{42}", 1), ("$\\boxed{\\frac{84}{2}}$", 0),
        (TAGGED.format(""), 0), (TAGGED.format("41"), 0), (TAGGED.format("42 or 43"), 0), (TAGGED.format("142"), 0),
        (TAGGED.format("42") + "<answer>43</answer>", 0), ("42", 0), ("", 0), ("<answer>42", 0), ("\\boxed{42", 0),
        ("<think><answer>42</answer></think>", 0), (TAGGED.format("9**9**9**9"), 0), (TAGGED.format("٤٢"), 0),
        (TAGGED.format("4²"), 0), (TAGGED.format("42/0"), 0), (TAGGED.format("nan"), 0), (TAGGED.format("1e400"), 0),
        (TAGGED.format("4" * 100_000), 0), ("<answer>" * 50_000, 0), ("\\boxed{" * 50_000, 0),
    ],
)  # fmt: skip
def test_accuracy(text, score):
    """The abuses of verifiers that others have met score nothing: empty, many, substring, towers of powers, other digits."""
    assert rewards.accuracy(Problem(prompt="", answer="42"), text) == score


def test_answers_that_are_words():
    paris = Problem(prompt="", answer="Paris")
    assert rewards.accuracy(paris, TAGGED.format("paris")) == 1
    assert rewards.accuracy(paris, TAGGED.format("Paris, London")) == 0
    assert rewards.accuracy(Problem(prompt="", answer="1/2"), TAGGED.format("0.5")) == 1
    assert rewards.accuracy(Problem(prompt="", answer="-3"), TAGGED.format("−3")) == 1


def test_plain_accuracy():
    digit, number = Problem(prompt="", answer="7"), Problem(prompt="", answer="42")
    assert [rewards.plain_accuracy(digit, text) for text in ("1237", "7", "", "73", " 7\n")] == [1, 1, 0, 0, 1]
    texts = ("= 42", "42", "142", "", "42.", "-42", "so 3.42")
    assert [rewards.plain_accuracy(number, text) for text in texts] == [1, 1, 0, 0, 0, 0, 0]
    assert rewards.plain_accuracy(digit, "=-7") == 0 and rewards.plain_accuracy(Problem(prompt="", answer=""), "x") == 0


def test_a_pair_is_no_number():
    assert rewards.equal_answers("1,234", "1234") and not rewards.equal_answers("3,4", "34")


@pytest.mark.parametrize(
    "expression, score",
    [
        ("(3 + 5) * 2", 1), ("2*(5+3)", 1), ("(3 + 5) * 2 = 16", 1), ("16", 0), ("3 + 5 + 2 + 6", 0), ("8 * 2", 0),
        ("(3 + 5) * 2 + 0", 0), ("__import__('os').system('x')", 0), ("9**9**9**9", 0), ("(" * 190, 0), ("3/0", 0),
        ("3 + 5 * 2.0", 0), ("True", 0), ("(3 + 5) * 2 if 1 else 0", 0), ("", 0), ("(3 + 5) * ２", 0),
    ],
)  # fmt: skip
def test_countdown(expression, score):
    problem = Problem(prompt="", answer="", extra=(("numbers", (2, 3, 5)), ("target", 16)))
    assert rewards.countdown(problem, TAGGED.format(expression)) == score


def test_language_share():
    assert rewards.language_share("<think>we add two numbers</think> 答案", "en") == 1
    assert rewards.language_share("<think>我们 add 两 numbers</think>", "zh") == 3 / 5
    assert rewards.language_share("<think>1 + 1 = 2</think>", "en") == 0
    assert rewards.language_share("да yes", "en") == 1 / 2
    with pytest.raises(ValueError, match="language = 'fr'"):
        rewards.language_share("", "fr")


def test_overlong_penalty():
    assert [rewards.overlong_penalty(n, 100, 20) for n in (10, 80, 90, 100, 130)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer = 0"):
        rewards.overlong_penalty(1, 10, 0)


def test_a_reward_must_be_a_number():
    assert rewards.checked(1) == 1.0
    for score in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rewards must be finite"):
            rewards.checked(score)
