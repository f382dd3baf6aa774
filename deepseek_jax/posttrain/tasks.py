"""Problems with answers that a rule can check, each made from a seed and a number: nothing is downloaded.

A problem's split follows from its own prompt, so that no prompt is in both, whatever the seeds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from deepseek_jax import storage
from deepseek_jax.config import require

Split = Literal["train", "test"]
_TEST_SHARE = 10  # one prompt in so many is kept for tests
_TRIES = 1000


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question."""

    prompt: str
    answer: str
    """The reference that a reward compares with."""
    steps: str = ""
    """A worked solution without the answer, where the task has one: for documents that write their steps down."""
    extra: tuple[tuple[str, Any], ...] = ()
    """What else a checker needs, such as countdown's numbers."""
    source: str = ""
    """The part of a mixture that it is of; rewards may be for some parts alone."""


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to."""
    return "test" if zlib.crc32(prompt.encode()) % _TEST_SHARE == 0 else "train"


@dataclass(frozen=True, kw_only=True)
class RunningSum:
    """`digits` digits; the answer is their sum modulo 10, the steps are the running sums modulo 10.

    The task of the smallest reproduction of R1-Zero: a model of a hundred thousand parameters learns each step but not the
    sum at one glance.
    """

    digits: int = 6

    def __post_init__(self) -> None:
        require(self.digits >= 2, "RunningSum", "digits", self.digits, "must be at least 2")

    def draw(self, rng: np.random.Generator) -> Problem:
        numbers = rng.integers(0, 10, self.digits)
        sums = np.cumsum(numbers) % 10
        return Problem(prompt="".join(map(str, numbers)), answer=str(sums[-1]), steps="".join(map(str, sums[:-1])))


@dataclass(frozen=True, kw_only=True)
class ChainSum:
    """A chain of additions and subtractions of numbers up to `digits` digits."""

    terms: int = 4
    digits: int = 2

    def __post_init__(self) -> None:
        require(self.terms >= 2, "ChainSum", "terms", self.terms, "must be at least 2")
        require(1 <= self.digits <= 9, "ChainSum", "digits", self.digits, "must be in [1, 9]")

    def draw(self, rng: np.random.Generator) -> Problem:
        numbers = [int(n) for n in rng.integers(0, 10**self.digits, self.terms)]
        signs = [1, *(int(s) for s in rng.choice([-1, 1], self.terms - 1))]
        text = str(numbers[0]) + "".join(
            f" {'+' if s > 0 else '-'} {n}" for s, n in zip(signs[1:], numbers[1:], strict=True)
        )
        sums = np.cumsum([s * n for s, n in zip(signs, numbers, strict=True)]).tolist()
        return Problem(
            prompt=f"What is {text}?", answer=str(sums[-1]), steps="\n".join(str(partial) for partial in sums[:-1])
        )


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """Reach a target with every one of some numbers, once each, by + - * and /. `rewards.countdown` checks an expression."""

    numbers: int = 3
    largest: int = 30

    def __post_init__(self) -> None:
        require(2 <= self.numbers <= 6, "Countdown", "numbers", self.numbers, "must be in [2, 6]")
        require(self.largest >= 2, "Countdown", "largest", self.largest, "must be at least 2")

    def draw(self, rng: np.random.Generator) -> Problem:
        while True:
            numbers = [int(n) for n in rng.integers(1, self.largest + 1, self.numbers)]
            value, text = numbers[0], str(numbers[0])
            for n in numbers[1:]:
                operation = "+-*/"[int(rng.integers(0, 4))]
                if operation == "/" and value % n:
                    operation = "-"
                value = {"+": value + n, "-": value - n, "*": value * n, "/": value // n}[operation]
                text = f"({text} {operation} {n})"
            if 0 < value <= 100 * self.largest:
                break
        shown = ", ".join(str(n) for n in rng.permutation(numbers))
        return Problem(
            prompt=f"Using the numbers {shown}, each once, make an expression that equals {value}.",
            answer=text[1:-1],
            extra=(("numbers", tuple(sorted(numbers))), ("target", value)),
        )


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """A dataset of the package reasoning-gym (extra `tasks`), by name."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def draw(self, rng: np.random.Generator) -> Problem:
        try:
            import reasoning_gym
        except ImportError:
            raise ValueError(
                f"ReasoningGym.name = {self.name!r}: pip install 'deepseek-jax[tasks]' brings reasoning-gym"
            ) from None
        try:
            dataset = reasoning_gym.create_dataset(
                self.name, seed=int(rng.integers(2**31)), size=1, **dict(self.options)
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"ReasoningGym.name = {self.name!r}, options = {self.options}: {error}") from None
        item = dataset[0]
        if item["answer"] is None:
            raise ValueError(f"ReasoningGym.name = {self.name!r} has no reference answers: choose another dataset")
        return Problem(prompt=item["question"], answer=str(item["answer"]))


Task = RunningSum | ChainSum | Countdown | ReasoningGym


def problem(task: Task, split: Split, index: int, seed: int = 0) -> Problem:
    """Problem number `index` of a split; a function of its arguments alone.

    Raises: ValueError where the task has hardly a prompt in that split.
    """
    for attempt in range(_TRIES):
        drawn = task.draw(np.random.default_rng((seed, index, attempt)))
        if split_of(drawn.prompt) == split:
            return drawn
    raise ValueError(f"{task} has no prompt for {split!r} in {_TRIES} draws: it has too few different problems")


def problems(task: Task, split: Split, count: int, seed: int = 0) -> Iterator[Problem]:
    """The first `count` problems of a split."""
    return (problem(task, split, index, seed) for index in range(count))


def read_problems(path: storage.AnyPath, *, prompt: str = "prompt", answer: str = "answer") -> list[Problem]:
    """Problems of a JSONL file, a line each; "tests" are the test cases of a program that is asked for.

    Raises: ValueError for a line that is no object or lacks a field, with its number.
    """
    found = []
    for number, line in enumerate(storage.path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        missing = [name for name in (prompt, answer) if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: no field {', '.join(missing)}")
        found.append(Problem(prompt=str(row[prompt]), answer=str(row[answer]), extra=_extra(row, path, number)))
    return found


def _extra(row: dict[str, Any], path: storage.AnyPath, number: int) -> tuple[tuple[str, Any], ...]:
    """Test cases of a program, where a row has them: "tests": [{"input": …, "output": …}, …]."""
    if "tests" not in row:
        return ()
    try:
        tests = tuple((str(test["input"]), str(test["output"])) for test in row["tests"])
    except (TypeError, KeyError):
        raise ValueError(
            f"{path}, line {number}: tests must be a list of objects with input and output, both texts"
        ) from None
    return (("tests", tests),)
